//! What a statement may leave behind in the server process beyond its transaction, read from its words alone.
//!
//! Invariant: errs towards an effect. A word that looks like a call of a listed function counts, whatever its schema.
//!
//! Non-goal: what functions do inside. No text shows it; the catalogue's list of harmless functions is the planner's.

use crate::sql::class::{Class, SetValue, classify};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::word;

use super::pin::{Pin, Pins};

/// What [`session_effects`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Effects {
    /// Reasons to keep the connection once the statement has run.
    pub pins: Pins,
    /// It writes or notifies although it may look like a read.
    pub writes: bool,
    /// It draws from a sequence: a later currval() or lastval() must run on the same connection to mean anything.
    pub draws: bool,
}

/// Functions whose effect outlives the transaction; names as the server has them.
const PINNING: [(&str, Pin); 12] = [
    ("pg_advisory_lock", Pin::AdvisoryLock),
    ("pg_advisory_lock_shared", Pin::AdvisoryLock),
    ("pg_try_advisory_lock", Pin::AdvisoryLock),
    ("pg_try_advisory_lock_shared", Pin::AdvisoryLock),
    ("set_config", Pin::SetConfig),
    ("currval", Pin::SequenceState),
    ("lastval", Pin::SequenceState),
    ("setseed", Pin::RandomSeed),
    ("dblink_connect", Pin::Dblink),
    ("dblink_connect_u", Pin::Dblink),
    ("dblink_open", Pin::Dblink),
    ("pg_replication_origin_session_setup", Pin::Unparsed),
];

/// Functions that write, as the text alone shows.
const WRITING: [&str; 7] = [
    "pg_notify",
    "nextval",
    "setval",
    "pg_logical_emit_message",
    "pg_create_restore_point",
    "pg_switch_wal",
    "pg_cancel_backend",
];

/// Scans the one statement in `tokens` (a range of the tokens of `sql`).
pub fn session_effects(sql: &str, tokens: &[Token]) -> Effects {
    effects_of(&classify(sql, tokens), sql, tokens)
}

/// [`session_effects`] of a statement whose class is known.
pub fn effects_of(class: &Class, sql: &str, tokens: &[Token]) -> Effects {
    let mut effects = Effects::default();
    scan_words(sql, tokens, &mut effects);
    match class {
        Class::Listen(_) => effects.pins.insert(Pin::Listen),
        Class::Declare { hold: true, .. } => effects.pins.insert(Pin::HoldCursor),
        Class::Prepare { .. } => effects.pins.insert(Pin::SqlPrepare),
        Class::Load => effects.pins.insert(Pin::LoadedLibrary),
        Class::Set { name, value: SetValue::Text(_), .. } if *name == "seed" => effects.pins.insert(Pin::RandomSeed),
        Class::Do => scan_body(sql, tokens, &mut effects),
        Class::Notify(_) => effects.writes = true,
        _ => {}
    }
    effects
}

fn scan_words(sql: &str, tokens: &[Token], effects: &mut Effects) {
    for (index, &token) in tokens.iter().enumerate() {
        match token.kind {
            TokenKind::Word | TokenKind::QuotedWord => {
                let called = tokens.get(index + 1).is_some_and(|next| next.kind == TokenKind::LeftParen);
                if called {
                    scan_call(sql, tokens, index, effects);
                }
                if names_temporary(sql, tokens, index) {
                    effects.pins.insert(Pin::TempTable);
                }
            }
            // SET search_path TO 'pg_temp', and the like.
            TokenKind::String if token.text(sql).contains("pg_temp") => effects.pins.insert(Pin::TempTable),
            _ => {}
        }
    }
}

/// `tokens[index]` is a word in front of a parenthesis.
fn scan_call(sql: &str, tokens: &[Token], index: usize, effects: &mut Effects) {
    let Some(name) = word::name(sql, tokens[index]) else {
        effects.pins.insert(Pin::Unparsed);
        return;
    };
    let pin = PINNING.iter().find(|(function, _)| *function == name).map(|(_, pin)| *pin);
    if let Some(pin) = pin.filter(|pin| *pin != Pin::SetConfig || !is_local_set_config(sql, &tokens[index + 1..])) {
        effects.pins.insert(pin);
    }
    effects.draws |= name == "nextval";
    effects.writes |= WRITING.contains(&name.as_str()) || name.starts_with("lo_");
}

/// Is the third argument of set_config the constant true? Then the setting ends with the transaction, like SET LOCAL.
fn is_local_set_config(sql: &str, arguments: &[Token]) -> bool {
    let Some(open) = arguments.first() else { return false };
    let inside = open.depth.saturating_add(1);
    let Some(close) = arguments.iter().position(|token| token.kind == TokenKind::RightParen && token.depth == inside)
    else {
        return false;
    };
    let commas =
        arguments[..close].iter().filter(|token| token.kind == TokenKind::Comma && token.depth == inside).count();
    let last = arguments[close - 1];
    let alone = arguments[close.saturating_sub(2)].kind == TokenKind::Comma;
    let value = last.is_word(sql, "true") || matches!(last.text(sql), "'t'" | "'true'");
    commas == 2 && alone && value
}

/// CREATE TEMP, INTO TEMP, or a name in the temporary schema.
fn names_temporary(sql: &str, tokens: &[Token], index: usize) -> bool {
    let token = tokens[index];
    let text = token.text(sql);
    if text.len() >= 7 && text.is_char_boundary(7) {
        let start = if token.kind == TokenKind::QuotedWord { &text[1..] } else { text };
        if start.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("pg_temp")) {
            return true;
        }
    }
    let follows = ["create", "into", "replace", "local", "global"];
    let temporary = token.is_word(sql, "temp") || token.is_word(sql, "temporary");
    temporary && index > 0 && follows.iter().any(|word| tokens[index - 1].is_word(sql, word))
}

/// DO runs a body we cannot read as SQL; what its words show counts, and dynamic SQL counts as anything.
fn scan_body(sql: &str, tokens: &[Token], effects: &mut Effects) {
    effects.writes = true;
    let mut inner = Vec::new();
    for &token in tokens {
        let Some(body) = word::string_value(sql, token) else { continue };
        if lex(&body, &mut inner).is_err() {
            effects.pins.insert(Pin::Unparsed);
            continue;
        }
        scan_words(&body, &inner, effects);
        let changes = (0..inner.len()).any(|index| hides_state(&body, &inner, index));
        if changes {
            effects.pins.insert(Pin::Unparsed);
        }
    }
}

/// Dynamic SQL, or a statement that changes the session. Only where a statement may start: UPDATE, too, has a SET.
fn hides_state(body: &str, tokens: &[Token], index: usize) -> bool {
    let starts = index == 0
        || tokens[index - 1].kind == TokenKind::Semicolon
        || ["begin", "then", "else", "loop"].iter().any(|word| tokens[index - 1].is_word(body, word));
    let changing = ["set", "reset", "discard", "listen", "load", "prepare", "call", "do"];
    tokens[index].is_word(body, "execute") || (starts && changing.iter().any(|word| tokens[index].is_word(body, word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effects(sql: &str) -> Effects {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
        session_effects(sql, &tokens)
    }

    #[test]
    fn what_pins() {
        let cases = [
            ("select pg_advisory_lock(1)", Pin::AdvisoryLock),
            ("select 1 where pg_catalog.\"pg_try_advisory_lock_shared\" (1)", Pin::AdvisoryLock),
            ("select set_config('a.b', 'c', false)", Pin::SetConfig),
            ("select set_config('a.b', 'c', $1)", Pin::SetConfig),
            ("select set_config('a.b', 'c', not true)", Pin::SetConfig),
            ("create temp table t (a int)", Pin::TempTable),
            ("create or replace local temporary view v as select 1", Pin::TempTable),
            ("select 1 into temp t", Pin::TempTable),
            ("create table PG_temp.t (a int)", Pin::TempTable),
            ("create table \"pg_temp_3\".t (a int)", Pin::TempTable),
            ("set search_path = 'pg_temp', public", Pin::TempTable),
            ("explain analyze create temp table t as select 1", Pin::TempTable),
            ("select lastval()", Pin::SequenceState),
            ("select currval('s')", Pin::SequenceState),
            ("listen c", Pin::Listen),
            ("prepare p as select 1", Pin::SqlPrepare),
            ("declare c cursor with hold for select 1", Pin::HoldCursor),
            ("load 'x'", Pin::LoadedLibrary),
            ("set seed to 0.5", Pin::RandomSeed),
            ("select setseed(0.5)", Pin::RandomSeed),
            ("select dblink_connect('x')", Pin::Dblink),
            ("do $$ begin execute 'x'; end $$", Pin::Unparsed),
            ("do $$ begin set work_mem = 1; end $$", Pin::Unparsed),
            ("do $$ begin create temp table t (); end $$", Pin::TempTable),
            ("do 'begin perform pg_advisory_lock(1); end'", Pin::AdvisoryLock),
        ];
        for (sql, pin) in cases {
            assert!(effects(sql).pins.contains(pin), "{sql}: {:?}", effects(sql));
        }
    }

    #[test]
    fn what_does_not() {
        for sql in [
            "select pg_advisory_xact_lock(1), pg_advisory_unlock(1)",
            "select set_config('a.b', 'c', true)",
            "select 'create temp table', temp, \"temporary\" from t",
            "select temp from t -- listen",
            "prepare transaction 'x'",
            "declare c cursor without hold for select 1",
            "discard temp",
            "select a.set_config from a",
            "do $$ begin update t set a = 1; end $$",
            "set work_mem = '1MB'",
        ] {
            assert!(effects(sql).pins.is_empty(), "{sql}: {:?}", effects(sql));
        }
    }

    #[test]
    fn what_writes() {
        for sql in [
            "select pg_notify('a', 'b')",
            "select nextval('s')",
            "select lo_create(1)",
            "notify a",
            "do $$ begin end $$",
        ] {
            assert!(effects(sql).writes, "{sql}");
        }
        assert!(effects("select nextval('s')").draws);
        assert!(!effects("select 1").writes);
    }
}
