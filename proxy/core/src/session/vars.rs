//! The settings of a session, followed through transactions, and how to bring a server connection to them.
//!
//! Invariant: [`Vars::current`] is what the server would show for every setting the session changed by SET; where that
//! cannot be known the session is uncertain and must keep its connection ([`super::pin::Pin::SetInsideUncertainTransaction`]).
//! The rules are those of src/backend/utils/misc/guc.c (AtEOXact_GUC, GUC_NO_RESET_ALL, session_authorization and role).
//!
//! Must not enter a [`VarSet`]: settings of one transaction only, and the random seed.

use std::fmt::Write as _;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use foldhash::quality::FixedState;

mod datestyle;

use crate::sql::class::{Class, Discard, Modes, Scope, SetValue, Target};
use crate::sql::lex::{TokenKind, lex};
use crate::sql::word::{self, quote_literal, quote_name};

const ROLE: &str = "role";
pub(super) const SESSION_AUTHORIZATION: &str = "session_authorization";
const DATESTYLE: &str = "datestyle";

/// Settings a session may hold before it counts as uncertain; the product of both bounds what a client can make us keep.
const VARS_MAX: usize = 128;
const VALUE_BYTES_MAX: usize = 8 * 1024;
/// Savepoints followed inside one transaction.
const SAVEPOINTS_MAX: usize = 64;

/// Settings that a server reads a statement's text by, when it parses it or folds its constants: what it has prepared under one
/// value means something else than the same text under another. (Names in search_path are looked up again by the server.)
const READ_BY: [&str; 14] = [
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "client_encoding",
    "datestyle",
    "extra_float_digits",
    "intervalstyle",
    "lc_monetary",
    "standard_conforming_strings",
    "timezone",
    "timezone_abbreviations",
    "transform_null_equals",
    "xmlbinary",
    "xmloption",
];

/// How texts are read under some settings: two are alike only if those of [`READ_BY`] are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Reading(u64);

impl Reading {
    /// One that is nobody else's, for a session whose settings are not known: `session` is its number.
    pub fn own(session: u32) -> Self {
        Reading(u64::from(session) << 1 | 1)
    }

    fn of(vars: &[(String, String)]) -> Self {
        let parts = vars.iter().filter(|(name, _)| READ_BY.binary_search(&name.as_str()).is_ok()).collect::<Vec<_>>();
        if parts.is_empty() { Reading::default() } else { Reading(FixedState::with_seed(3).hash_one(parts) & !1) }
    }
}

/// Settings by name, each with the SQL text that stands behind `SET name TO`. Cheap to clone.
#[derive(Clone, Default)]
pub struct VarSet(Option<Arc<Inner>>);

struct Inner {
    /// Sorted by name.
    vars: Vec<(String, String)>,
    hash: u64,
    reading: Reading,
}

impl VarSet {
    /// Stable over processes and releases; 0 for the empty set. A collision can be made: compare the sets themselves
    /// where a wrong match would matter.
    pub fn hash(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.hash)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// How texts are read under these settings.
    pub fn reading(&self) -> Reading {
        self.0.as_ref().map_or(Reading::default(), |inner| inner.reading)
    }

    /// Names and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.as_slice().iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.find(name).ok()?;
        Some(&self.as_slice()[at].1)
    }

    /// `name` must be canonical. False, and nothing changed, if the set would outgrow its bounds.
    pub fn set(&mut self, name: &str, value: &str) -> bool {
        let found = self.find(name);
        let whole = (name == DATESTYLE).then(|| datestyle::merge(found.ok().map(|at| &*self.as_slice()[at].1), value));
        let value = whole.as_deref().unwrap_or(value);
        if value.len() > VALUE_BYTES_MAX || (found.is_err() && self.as_slice().len() >= VARS_MAX) {
            return false;
        }
        let mut vars = self.as_slice().to_vec();
        match found {
            Ok(at) if vars[at].1 == value => return true,
            Ok(at) => value.clone_into(&mut vars[at].1),
            Err(at) => vars.insert(at, (name.to_owned(), value.to_owned())),
        }
        *self = VarSet::of_sorted(vars);
        true
    }

    pub fn remove(&mut self, name: &str) {
        if let Ok(at) = self.find(name) {
            let mut vars = self.as_slice().to_vec();
            vars.remove(at);
            *self = VarSet::of_sorted(vars);
        }
    }

    /// The schemas of search_path in order (`$user` as it stands), if the session has set one.
    pub fn search_path(&self) -> Option<Vec<String>> {
        let value = self.get("search_path")?;
        let mut tokens = Vec::new();
        lex(value, &mut tokens).ok()?;
        let name = |token| word::name(value, token).or_else(|| word::string_value(value, token).map(Into::into));
        Some(tokens.into_iter().filter(|token| token.kind != TokenKind::Comma).filter_map(name).collect())
    }

    fn as_slice(&self) -> &[(String, String)] {
        self.0.as_ref().map_or(&[], |inner| &inner.vars)
    }

    fn find(&self, name: &str) -> Result<usize, usize> {
        self.as_slice().binary_search_by(|(have, _)| have.as_str().cmp(name))
    }

    fn of_sorted(vars: Vec<(String, String)>) -> Self {
        if vars.is_empty() {
            return VarSet(None);
        }
        let hash = fnv(&vars).max(1);
        let reading = Reading::of(&vars);
        VarSet(Some(Arc::new(Inner { vars, hash, reading })))
    }
}

impl PartialEq for VarSet {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(left), Some(right)) => {
                Arc::ptr_eq(left, right) || (left.hash == right.hash && left.vars == right.vars)
            }
            _ => false,
        }
    }
}

impl Eq for VarSet {}

impl std::fmt::Debug for VarSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// FNV-1a, 64 bits; 0xff ends each part because no UTF-8 text holds it.
fn fnv(vars: &[(String, String)]) -> u64 {
    let parts = vars.iter().flat_map(|(name, value)| [name, value]);
    let bytes = parts.flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A session's settings now, at the end of its transaction, and at each savepoint.
#[derive(Clone, Debug)]
pub struct Vars {
    startup: VarSet,
    levels: Levels,
    /// Present from the first statement of a transaction to its end.
    transaction: Option<Transaction>,
    uncertain: bool,
}

/// What holds now, SET LOCAL included, and what will hold after COMMIT.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Levels {
    current: VarSet,
    committed: VarSet,
}

#[derive(Clone, Debug)]
struct Transaction {
    before: Levels,
    uncertain_before: bool,
    savepoints: Vec<(String, Levels)>,
    /// More savepoints than we follow: names no longer tell which one is meant.
    savepoints_lost: bool,
}

impl Vars {
    /// `startup` is what RESET returns to; see [`super::startup::startup_vars`].
    pub fn new(startup: VarSet) -> Self {
        let levels = Levels { current: startup.clone(), committed: startup.clone() };
        Vars { startup, levels, transaction: None, uncertain: false }
    }

    /// A server connection's own settings, for which RESET means the server's defaults. `before`: what they were when the open
    /// transaction began.
    pub fn of_server(now: VarSet, before: Option<VarSet>) -> Self {
        let mut vars = Vars::new(before.clone().unwrap_or_else(|| now.clone()));
        if before.is_some() {
            vars.on_begin();
        }
        vars.startup = VarSet::default();
        vars.levels = Levels { current: now.clone(), committed: now };
        vars
    }

    /// What held when the open transaction began, else what holds now.
    pub fn before(&self) -> &VarSet {
        self.transaction.as_ref().map_or(&self.levels.current, |transaction| &transaction.before.current)
    }

    /// What holds now; between transactions this is what a leased connection must be brought to.
    pub fn current(&self) -> &VarSet {
        &self.levels.current
    }

    /// True if the server may have settings we do not know: the session must keep its connection.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain
    }

    /// Follows a statement the server has acknowledged. `in_transaction`: it ran in a transaction block, an implicit one
    /// of a multi-statement query included. A failed COMMIT, which the server answers with ROLLBACK, is a
    /// [`Class::Rollback`].
    pub fn on_done(&mut self, class: &Class, in_transaction: bool) {
        match class {
            Class::Begin(_) => self.on_begin(),
            Class::Set { name, value: SetValue::Text(value), scope } => {
                self.on_set(name, value, *scope, in_transaction);
            }
            Class::Set { name, value: SetValue::Default, scope } => {
                self.change(*scope, in_transaction, |vars, startup| {
                    reset(vars, startup, name);
                    true
                });
            }
            Class::SetCharacteristics(modes) => self.on_characteristics(*modes, in_transaction),
            Class::Reset(target) => self.on_reset(target, in_transaction),
            Class::Discard(Discard::All) => self.on_discard_all(),
            Class::Savepoint(name) => self.on_savepoint(name),
            Class::Release(name) => self.on_release(name),
            Class::RollbackTo(name) => self.on_rollback_to(name),
            Class::Commit { chain } => self.on_end(true, *chain),
            Class::Rollback { chain } => self.on_end(false, *chain),
            Class::PrepareTransaction => self.on_end(true, false),
            _ => {}
        }
    }

    /// A transaction block has begun. Only its first call counts.
    pub fn on_begin(&mut self) {
        let before = &self.levels;
        let uncertain_before = self.uncertain;
        self.transaction.get_or_insert_with(|| Transaction {
            before: before.clone(),
            uncertain_before,
            savepoints: Vec::new(),
            savepoints_lost: false,
        });
    }

    /// `value` is SQL text as [`SetValue::Text`] has it.
    pub fn on_set(&mut self, name: &str, value: &str, scope: Scope, in_transaction: bool) {
        if is_untracked(name) {
            return;
        }
        self.change(scope, in_transaction, |vars, _| {
            if name == SESSION_AUTHORIZATION {
                vars.remove(ROLE);
            }
            vars.set(name, value)
        });
    }

    pub fn on_reset(&mut self, target: &Target, in_transaction: bool) {
        self.change(Scope::Session, in_transaction, |vars, startup| {
            match target {
                Target::Name(name) => reset(vars, startup, name),
                Target::All => reset_all(vars, startup),
            }
            true
        });
    }

    /// DISCARD ALL resets the authorization as well and leaves nothing unknown.
    pub fn on_discard_all(&mut self) {
        *self = Vars::new(self.startup.clone());
    }

    pub fn on_commit(&mut self) {
        self.on_end(true, false);
    }

    pub fn on_rollback(&mut self) {
        self.on_end(false, false);
    }

    pub fn on_savepoint(&mut self, name: &str) {
        self.on_begin();
        let levels = self.levels.clone();
        let Some(transaction) = &mut self.transaction else { return };
        if transaction.savepoints.len() < SAVEPOINTS_MAX {
            transaction.savepoints.push((name.to_owned(), levels));
        } else {
            transaction.savepoints_lost = true;
        }
    }

    /// The savepoint and all behind it are gone; their settings stay.
    pub fn on_release(&mut self, name: &str) {
        if let Some(transaction) = &mut self.transaction {
            let at = transaction.savepoints.iter().rposition(|(have, _)| have == name);
            transaction.savepoints.truncate(at.unwrap_or(transaction.savepoints.len()));
        }
    }

    /// Settings return to what they were at the savepoint, which stays.
    pub fn on_rollback_to(&mut self, name: &str) {
        let Some(transaction) = &mut self.transaction else { return };
        let at = transaction.savepoints.iter().rposition(|(have, _)| have == name);
        match at {
            Some(at) if !transaction.savepoints_lost => {
                transaction.savepoints.truncate(at + 1);
                self.levels = transaction.savepoints[at].1.clone();
            }
            // If nothing has changed since BEGIN it does not matter which savepoint it was.
            _ => self.uncertain |= self.levels != transaction.before,
        }
    }

    fn on_characteristics(&mut self, modes: Modes, in_transaction: bool) {
        let flag = |value: bool| if value { "on" } else { "off" };
        let settings = [
            ("default_transaction_isolation", modes.isolation.map(|isolation| quote_literal(isolation.as_str()))),
            ("default_transaction_read_only", modes.read_only.map(|value| flag(value).to_owned())),
            ("default_transaction_deferrable", modes.deferrable.map(|value| flag(value).to_owned())),
        ];
        for (name, value) in settings {
            if let Some(value) = value {
                self.on_set(name, &value, Scope::Session, in_transaction);
            }
        }
    }

    fn on_end(&mut self, committed: bool, chain: bool) {
        let undone = self.transaction.take().filter(|_| !committed);
        if let Some(transaction) = undone {
            self.levels = transaction.before;
            self.uncertain = transaction.uncertain_before;
        }
        self.levels.current = self.levels.committed.clone();
        if chain {
            self.on_begin();
        }
    }

    /// Applies a change to what holds now and, unless it is local, to what will hold. Local outside a transaction is
    /// nothing (the server only warns); a change that is not taken leaves the session uncertain.
    fn change(&mut self, scope: Scope, in_transaction: bool, apply: impl Fn(&mut VarSet, &VarSet) -> bool) {
        if in_transaction {
            self.on_begin();
        } else if scope == Scope::Local {
            return;
        }
        let mut taken = apply(&mut self.levels.current, &self.startup);
        if scope == Scope::Session {
            taken &= apply(&mut self.levels.committed, &self.startup);
        }
        self.uncertain |= !taken;
    }
}

/// Settings that end with the transaction by themselves, and the seed, which a replay would plant again.
fn is_untracked(name: &str) -> bool {
    matches!(name, "transaction_isolation" | "transaction_read_only" | "transaction_deferrable" | "seed")
}

fn reset(vars: &mut VarSet, startup: &VarSet, name: &str) {
    if name == SESSION_AUTHORIZATION {
        vars.remove(ROLE);
    }
    match startup.get(name) {
        Some(value) => {
            vars.set(name, value);
        }
        None => vars.remove(name),
    }
}

/// RESET ALL leaves role and session authorization alone.
fn reset_all(vars: &mut VarSet, startup: &VarSet) {
    let kept: Vec<_> = [ROLE, SESSION_AUTHORIZATION].map(|name| (name, vars.get(name).map(str::to_owned))).into();
    *vars = startup.clone();
    for (name, value) in kept {
        match value {
            Some(value) => {
                vars.set(name, &value);
            }
            None => vars.remove(name),
        }
    }
}

/// The simple query that brings a connection on which `from` has been applied to `to`; `None` if there is nothing to do.
///
/// The rights of the login role come back first, since a setting may need them, and are given up last.
pub fn replay(from: &VarSet, to: &VarSet) -> Option<String> {
    if from == to {
        return None;
    }
    let mut text = String::new();
    // Setting or resetting the session authorization resets the role with it.
    for name in [SESSION_AUTHORIZATION, ROLE] {
        if from.get(name).is_some() {
            push_reset(&mut text, name);
        }
    }
    let plain = |(name, _): &(&str, &str)| *name != ROLE && *name != SESSION_AUTHORIZATION;
    for (name, _) in from.iter().filter(plain).filter(|(name, _)| to.get(name).is_none()) {
        push_reset(&mut text, name);
    }
    for (name, value) in to.iter().filter(plain).filter(|(name, value)| from.get(name) != Some(value)) {
        // What a date style leaves open it takes from the one before, which may be another session's.
        if name == DATESTYLE && from.get(name).is_some() {
            push_reset(&mut text, name);
        }
        push_set(&mut text, name, value);
    }
    for name in [SESSION_AUTHORIZATION, ROLE] {
        if let Some(value) = to.get(name) {
            push_set(&mut text, name, value);
        }
    }
    Some(text)
}

fn push_reset(text: &mut String, name: &str) {
    text.push_str("RESET ");
    push_name(text, name);
    text.push(';');
}

fn push_set(text: &mut String, name: &str, value: &str) {
    // An interval is a time zone in this spelling only.
    if name == "timezone" && value.starts_with("interval") {
        let _ = write!(text, "SET TIME ZONE {value};");
        return;
    }
    text.push_str("SET ");
    push_name(text, name);
    let _ = write!(text, " TO {value};");
}

/// Every part is quoted: a setting's name is the client's choice and may be a keyword.
fn push_name(text: &mut String, name: &str) {
    for (index, part) in name.split('.').enumerate() {
        text.push_str(if index > 0 { "." } else { "" });
        text.push_str(&quote_name(part));
    }
}

#[cfg(test)]
mod tests;
