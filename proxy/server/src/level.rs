//! How fresh one statement's reads must be, and who says so.
//!
//! Invariant: a statement's hint wins over its session's setting, which wins over the role's section, which wins over the
//! database's. What cannot be read counts as the strictest level, and the client is told once. Non-goal: choosing a server
//! ([`crate::exec::read`], `weir_core::fresh::bound`).

use std::time::Duration;

use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::words::{Observation, WordSet};
use weir_core::fresh::{Choice, Level, PrimaryBecause, ReadBound};
use weir_core::id::ShardId;
use weir_core::plan::{Access, NoCacheReason, Plan, Target};
use weir_core::sql::class::{Class, SetValue};
use weir_core::sql::hint::hints;
use weir_core::sql::lex::{Token, TokenKind, lex};
use weir_core::sql::word;
use weir_core::topology::Topology;

use crate::database::Database;
use crate::front::session::Session;

/// The setting by which a session chooses a level.
pub const SETTING: &str = "weir.freshness";
/// The keys of hints.
const KEY: &str = "freshness";
const CACHE_KEY: &str = "cache";

/// What a comment around a statement asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hint {
    freshness: Said,
    /// Its answer is neither to be cached nor to be taken from the cache.
    pub uncached: bool,
}

/// What a hint says of freshness.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Said {
    #[default]
    Nothing,
    Level(Level),
    /// Something in it is addressed to weir, but means nothing.
    Unknown,
}

/// Who has chosen a level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chosen {
    Statement,
    Session,
    Role,
    Database,
}

impl Hint {
    pub fn around(sql: &str, tokens: &[Token]) -> Hint {
        let mut hint = Hint::default();
        for one in hints(sql, tokens) {
            match (&*one.key, &*one.value, Level::parse(&one.value)) {
                (CACHE_KEY, "never", _) => hint.uncached = true,
                (CACHE_KEY, "auto", _) => {}
                (KEY, _, Some(level)) if hint.freshness != Said::Unknown => hint.freshness = Said::Level(level),
                _ => hint.freshness = Said::Unknown,
            }
        }
        hint
    }

    /// Whether an answer may be cached, given what is so without the hint.
    pub fn cacheable(self, plan: Result<(), NoCacheReason>) -> Result<(), NoCacheReason> {
        if self.uncached { plan.and(Err(NoCacheReason::Hint)) } else { plan }
    }
}

impl std::fmt::Display for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Chosen::Statement => "said by the statement's hint",
            Chosen::Session => "set by the session",
            Chosen::Role => "configured for the role",
            Chosen::Database => "configured for the database, or by default",
        })
    }
}

/// The level in a setting's value, which is SQL text. `None`: it is no level.
fn level_in(value: &str) -> Option<Level> {
    let mut tokens = Vec::new();
    lex(value, &mut tokens).ok()?;
    let [token] = tokens[..] else { return None };
    let text = match token.kind {
        TokenKind::Word => Some(token.text(value).to_ascii_lowercase().into()),
        _ => word::string_value(value, token),
    };
    Level::parse(&text?)
}

impl Session {
    /// How fresh the reads of a statement with this hint must be.
    pub fn level(&self, hint: Hint) -> (Level, Chosen) {
        match hint.freshness {
            Said::Level(level) => return (level, Chosen::Statement),
            Said::Unknown => return (Level::Strict, Chosen::Statement),
            Said::Nothing => {}
        }
        if let Some(value) = self.vars.current().get(SETTING) {
            return (level_in(value).unwrap_or_default(), Chosen::Session);
        }
        match self.pools.freshness() {
            (level, true) => (level, Chosen::Role),
            (level, false) => (level, Chosen::Database),
        }
    }

    /// For how many milliseconds an answer may be overtaken, where its tables allow `stale_ms`. `None`: somebody has asked for
    /// strictness.
    pub fn stale_ms(&self, stale_ms: u32, hint: Hint) -> Option<u32> {
        match self.level(hint) {
            (Level::Strict, Chosen::Statement | Chosen::Session | Chosen::Role) => None,
            (Level::Lag(ms), _) => Some(stale_ms.min(ms)),
            _ => Some(stale_ms),
        }
    }

    /// The hint of a text that is to be explained.
    pub fn hint_around(&mut self, sql: &str) -> Hint {
        crate::statements::relex(sql, &mut self.scratch);
        Hint::around(sql, &self.scratch.tokens)
    }

    /// Tells the client, once, that a hint or setting of its means nothing.
    pub fn heed(&mut self, hint: Hint) {
        if self.told_level || hint.freshness != Said::Unknown {
            return;
        }
        self.told_level = true;
        let known = Level::SPELLINGS;
        let message = format!(
            "a hint to weir is not understood; the statement is read strictly (known: cache = never; freshness = {known})"
        );
        self.warn("01000", &message);
    }

    /// Refuses a level that there is not, as Postgres refuses the value of an enum.
    pub fn check_level(class: &Class) -> Result<(), UserError> {
        let Class::Set { name, value: SetValue::Text(value), .. } = class else { return Ok(()) };
        if name != SETTING || level_in(value).is_some() {
            return Ok(());
        }
        let said = value.trim_matches('\'');
        let message = format!("invalid value for parameter \"{SETTING}\": \"{said}\"");
        Err(UserError::new(Blame::Client, sqlstate::INVALID_PARAMETER_VALUE, message)
            .hint(format!("Available values: {}.", Level::SPELLINGS)))
    }

    /// What it takes to keep a level on a shard now.
    pub fn bound(&self, level: Level, shard: ShardId) -> ReadBound {
        match level {
            Level::Strict => ReadBound::Strict,
            Level::Session => ReadBound::Session(self.announced.mark(shard, &self.db.shard(shard).clock)),
            Level::Lag(_) | Level::Any => self.db.bound(level, shard),
        }
    }

    /// What EXPLAIN tells about who would answer a read.
    pub fn explain_level(&self, plan: &Plan, hint: Hint, topology: &Topology) -> Vec<(String, String)> {
        let (level, chosen) = self.level(hint);
        self.db.explain_level(plan, topology, (level, chosen), |shard| self.bound(level, shard))
    }
}

impl Database {
    /// What it takes to keep a level for a session that has written nothing.
    fn bound(&self, level: Level, shard: ShardId) -> ReadBound {
        match level {
            Level::Strict => ReadBound::Strict,
            Level::Session => ReadBound::Session(weir_core::fresh::SessionMark::Nothing),
            Level::Lag(ms) => {
                ReadBound::Lag(self.shard(shard).clock.position_since(Duration::from_millis(u64::from(ms))))
            }
            Level::Any => ReadBound::Any,
        }
    }

    /// As [`Session::explain_level`], for a statement without a session.
    pub fn route_level(&self, plan: &Plan, hint: Hint, topology: &Topology) -> Vec<(String, String)> {
        let level = match hint.freshness {
            Said::Level(level) => (level, Chosen::Statement),
            Said::Unknown => (Level::Strict, Chosen::Statement),
            Said::Nothing => (self.config.overrides.freshness.unwrap_or_default(), Chosen::Database),
        };
        self.explain_level(plan, topology, level, |shard| self.bound(level.0, shard))
    }

    fn explain_level(
        &self,
        plan: &Plan,
        topology: &Topology,
        (level, chosen): (Level, Chosen),
        bound: impl Fn(ShardId) -> ReadBound,
    ) -> Vec<(String, String)> {
        let shard = match &plan.target {
            Target::One(shard) => Some(*shard),
            Target::Home => Some(topology.home),
            Target::Any => topology.roster.any(0),
            Target::Many(shards) if shards.len() == 1 => Some(shards[0]),
            Target::All if topology.is_single() => Some(topology.home),
            Target::Many(_) | Target::All | Target::Engine => None,
        };
        if plan.access != Access::Read || plan.target == Target::Engine {
            return Vec::new();
        }
        let answered = match shard {
            None => "the primaries: it reads several shards".to_owned(),
            Some(shard) => match self.would_answer(shard, plan, bound(shard)) {
                Choice::Replica(number, _) => {
                    format!("replica {}, if it proves fresh enough", self.shard(shard).servers[number].view.endpoint)
                }
                Choice::Primary(because) => format!("the primary: {because}"),
            },
        };
        vec![("freshness".to_owned(), format!("{level}, {chosen}")), ("answered_by".to_owned(), answered)]
    }

    /// Who would be asked for a read now.
    fn would_answer(&self, shard: ShardId, plan: &Plan, bound: ReadBound) -> Choice {
        let here = self.shard(shard);
        if !here.has_replicas() {
            return Choice::Primary(PrimaryBecause::NoReplica);
        }
        match WordSet::for_read(&plan.reads) {
            None => Choice::Primary(PrimaryBecause::Unwatched),
            Some(set) => {
                let seen: Observation = here.words.observe(&set);
                match here.watches_words() {
                    Err(because) if bound.must_be_unmoved() => Choice::Primary(because),
                    _ => self.choose(shard, bound, &seen),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(sql: &str) -> Hint {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        Hint::around(sql, &tokens)
    }

    #[test]
    fn hints_mean_a_level_or_are_unknown() {
        let level = |level| Hint { freshness: Said::Level(level), uncached: false };
        assert_eq!(hint("/* weir: freshness=lag<=500ms */ SELECT 1"), level(Level::Lag(500)));
        assert_eq!(hint("SELECT 1 /*weir_freshness='any'*/"), level(Level::Any));
        assert_eq!(hint("SELECT 1 /* by hand */"), Hint::default());
        assert_eq!(hint("/* weir: cache=auto */ SELECT 1"), Hint::default());
        assert_eq!(hint("/* weir: cache=never */ SELECT 1"), Hint { uncached: true, ..Hint::default() });
        let both = hint("/* weir: cache=never, freshness=any */ SELECT 1");
        assert_eq!(both, Hint { uncached: true, ..level(Level::Any) });
        for unknown in ["freshness=soon", "cache=always", "cache", "freshnes=any", "any", "freshness=any, colour=blue"]
        {
            assert_eq!(
                hint(&format!("/* weir: {unknown} */ SELECT 1")),
                Hint { freshness: Said::Unknown, uncached: false },
                "{unknown}"
            );
        }
    }

    #[test]
    fn settings_are_sql_text() {
        assert_eq!(level_in("'lag <= 2s'"), Some(Level::Lag(2000)));
        assert_eq!(level_in("session"), Some(Level::Session));
        assert_eq!(level_in("STRICT"), Some(Level::Strict));
        for wrong in ["'soon'", "any, any", "7", ""] {
            assert_eq!(level_in(wrong), None, "{wrong}");
        }
    }
}
