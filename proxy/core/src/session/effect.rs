//! What a statement may leave behind in the server process beyond its transaction, read from its words alone.
//!
//! Invariant: errs towards an effect. A word that looks like a call of a listed function counts, whatever its schema. What a
//! function does inside is read from its body when the catalogue is ([`body_keeps`]) and found again by its name
//! ([`keeper_used`]).
//!
//! Non-goals: SQL that a function is handed from outside or reads from a table; states that libraries keep in immutable
//! functions.

use crate::sql::class::{Class, SetValue, classify};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::word;
use crate::topology::catalog::Keepers;
use crate::topology::catalog::reach::for_each_word;

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
    /// It sends a notification that bears the session's process number.
    pub notifies: bool,
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
        Class::Ddl(ddl)
            if matches!(ddl.what, "CREATE FUNCTION" | "CREATE PROCEDURE") && defines_keeper(sql, tokens) =>
        {
            effects.pins.insert(Pin::Function);
        }
        Class::Notify(_) => (effects.writes, effects.notifies) = (true, true),
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
                if updates_settings(sql, tokens, index) {
                    effects.pins.insert(Pin::SetConfig);
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
    effects.notifies |= name == "pg_notify";
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

/// UPDATE pg_settings calls set_config(), by a rule of that view.
fn updates_settings(sql: &str, tokens: &[Token], index: usize) -> bool {
    let before =
        |token: &Token| token.kind == TokenKind::Word && (token.is_word(sql, "update") || token.is_word(sql, "only"));
    let schema = index >= 2 && word::name(sql, tokens[index - 2]).is_some_and(|name| name == "pg_catalog");
    let start = if schema { index.checked_sub(3) } else { index.checked_sub(1) };
    word::name(sql, tokens[index]).is_some_and(|name| name == "pg_settings")
        && start.is_some_and(|start| before(&tokens[start]))
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

/// Does the statement use a function, view or trigger that may leave state behind?
pub fn keeper_used(sql: &str, tokens: &[Token], class: &Class, keepers: &Keepers) -> bool {
    if *keepers == Keepers::default() {
        return false;
    }
    let reads = matches!(class, Class::Select | Class::Values | Class::Table | Class::With { writes: false, .. });
    tokens.iter().enumerate().any(|(index, &token)| {
        let Some(name) = word::name(sql, token) else { return false };
        let called = tokens.get(index + 1).is_some_and(|next| next.kind == TokenKind::LeftParen);
        (called && keepers.functions.contains(&*name))
            || keepers.read.contains(&*name)
            || (!reads && keepers.written.contains(&*name))
    })
}

/// May a function of this language with this body leave state behind in the session?
///
/// SQL that it puts together counts by its literals; if it has none, what it executes comes from elsewhere and may be
/// anything. A function of C keeps what it likes. What it draws from a sequence and asks for again is its own.
pub fn body_keeps(language: &str, body: &str) -> bool {
    match language {
        "c" | "internal" => true,
        "sql" | "plpgsql" => text_keeps(body, true),
        _ => mentions_state(body),
    }
}

fn text_keeps(text: &str, outermost: bool) -> bool {
    let mut tokens = Vec::new();
    if lex(text, &mut tokens).is_err() {
        return mentions_state(text);
    }
    let mut effects = Effects::default();
    scan_words(text, &tokens, &mut effects);
    if effects.pins.iter().any(|pin| pin != Pin::SequenceState) {
        return true;
    }
    let local = ["local", "constraints", "transaction"];
    let changes = (0..tokens.len()).any(|index| {
        let next = tokens.get(index + 1);
        let spares = next.is_some_and(|next| local.iter().any(|word| next.is_word(text, word)));
        !spares && !tokens[index].is_word(text, "execute") && hides_state(text, &tokens, index)
    });
    let mut literals = tokens.iter().filter_map(|&token| word::string_value(text, token)).peekable();
    let executes = outermost && tokens.iter().any(|token| token.is_word(text, "execute"));
    changes || (executes && literals.peek().is_none()) || literals.any(|literal| text_keeps(&literal, false))
}

/// For text that is no SQL: a word that stands for a state.
fn mentions_state(text: &str) -> bool {
    let mut found = false;
    for_each_word(text, &mut |word| {
        let pins = PINNING.iter().any(|(function, pin)| *function == word && *pin != Pin::SequenceState);
        found |= pins || matches!(word, "temp" | "temporary" | "listen" | "discard");
    });
    found
}

/// CREATE FUNCTION with a body that keeps state. Its language is the word behind LANGUAGE, SQL if there is none.
fn defines_keeper(sql: &str, tokens: &[Token]) -> bool {
    let at = tokens.iter().position(|token| token.is_word(sql, "language")).map(|at| at + 1);
    let language = at.and_then(|at| tokens.get(at)).map_or_else(
        || "sql".to_owned(),
        |&token| {
            let quoted = word::string_value(sql, token).map(std::borrow::Cow::into_owned);
            quoted.or_else(|| word::name(sql, token)).unwrap_or_default()
        },
    );
    let body = tokens.iter().position(|token| token.is_word(sql, "as")).and_then(|at| tokens.get(at + 1));
    let body = body.and_then(|&token| word::string_value(sql, token)).unwrap_or_default();
    body_keeps(&language, &body)
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
            ("update pg_settings set setting = 'x'", Pin::SetConfig),
            ("update only pg_catalog.\"pg_settings\" set setting = 'x'", Pin::SetConfig),
            ("with u as (update pg_settings set setting = 'x' returning 1) select 1", Pin::SetConfig),
            ("do $$ begin update pg_settings set setting = 'x'; end $$", Pin::SetConfig),
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
    fn bodies_that_keep_state() {
        for (language, body) in [
            ("plpgsql", "begin perform set_config('a.b', x, false); end"),
            ("plpgsql", "begin set work_mem = 1; end"),
            ("sql", "update pg_settings set setting = 'x' where name = 'y'"),
            ("plpgsql", "begin create temporary table t (); end"),
            ("plpgsql", "begin execute 'set role ' || who; end"),
            ("plpgsql", "begin execute format('create temp table %I (a int)', name); end"),
            ("plpgsql", "begin execute statement; end"),
            ("sql", "select pg_advisory_lock(1)"),
            ("plpython3u", "plpy.execute('select pg_advisory_lock(1)')"),
            ("c", "set_ttdummy"),
        ] {
            assert!(body_keeps(language, body), "{body}");
        }
        for (language, body) in [
            ("plpgsql", "begin perform set_config('a.b', x, true); set local work_mem = 1; end"),
            ("plpgsql", "begin update t set a = 1; execute format('update %I set b = 2', name); end"),
            ("plpgsql", "begin insert into t default values; return currval('t_id_seq'); end"),
            ("sql", "select pg_advisory_xact_lock(1)"),
            ("plpython3u", "seen = set()"),
        ] {
            assert!(!body_keeps(language, body), "{body}");
        }
    }

    #[test]
    fn keepers_are_found_by_name() {
        let set = |name: &str| [name.into()].into_iter().collect();
        let keepers = Keepers { functions: set("f"), read: set("v"), written: set("t") };
        let used = |sql: &str| {
            let mut tokens = Vec::new();
            lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
            keeper_used(sql, &tokens, &classify(sql, &tokens), &keepers)
        };
        for sql in ["select f(1)", "call S.F()", "select * from v", "insert into t values (1)", "copy t from stdin"] {
            assert!(used(sql), "{sql}");
        }
        for sql in ["select f from x", "select * from t", "insert into x values ('f(')"] {
            assert!(!used(sql), "{sql}");
        }
        for sql in [
            "create function f() returns int language c as 'x', 'y'",
            "create procedure p() language plpgsql as $$ begin set a.b = 1; end $$",
        ] {
            assert!(effects(sql).pins.contains(Pin::Function), "{sql}");
        }
        assert!(effects("create function f() returns int language sql as 'select 1'").pins.is_empty());
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
            "select * from pg_settings for update",
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
        assert!(effects("select pg_notify('a', 'b')").notifies && effects("notify a").notifies);
        assert!(!effects("select 1").writes);
    }
}
