//! Settings followed through transactions, and replay against a model of a server.

use proptest::prelude::*;

use super::*;
use crate::sql::class::classify;
use crate::sql::normal::split_statements;

fn set_of(pairs: &[(&str, &str)]) -> VarSet {
    let mut vars = VarSet::default();
    for (name, value) in pairs {
        assert!(vars.set(name, value));
    }
    vars
}

fn classes(sql: &str) -> Vec<Class> {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
    split_statements(sql, &tokens).map(|range| classify(sql, &tokens[range])).collect()
}

/// A session that has run these statements; BEGIN and its end are seen in the text.
fn run(startup: &VarSet, sql: &str) -> Vars {
    let mut vars = Vars::new(startup.clone());
    let mut open = false;
    for class in classes(sql) {
        open |= matches!(class, Class::Begin(_));
        vars.on_done(&class, open);
        if let Class::Commit { chain } | Class::Rollback { chain } = class {
            open = chain;
        }
    }
    vars
}

#[test]
fn sets_compare_by_content_and_hash_stably() {
    let one = set_of(&[("a", "1"), ("b", "'x'")]);
    let other = set_of(&[("b", "'x'"), ("a", "1")]);
    assert_eq!(one, other);
    assert_eq!(one.hash(), other.hash());
    assert_eq!(VarSet::default().hash(), 0);
    assert_eq!(set_of(&[("a", "1")]).hash(), 15_256_350_014_033_025_077, "the hash is stable over releases");
    assert_ne!(set_of(&[("a", "bc")]).hash(), set_of(&[("ab", "c")]).hash());
    let mut emptied = set_of(&[("a", "1")]);
    emptied.remove("a");
    assert_eq!(emptied, VarSet::default());
}

#[test]
fn settings_follow_transactions() {
    let startup = set_of(&[("timezone", "'UTC'")]);
    let cases: [(&str, &[(&str, &str)]); 18] = [
        ("set a.x = 1", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("set local a.x = 1", &[("timezone", "'UTC'")]),
        ("begin; set a.x = 1; rollback", &[("timezone", "'UTC'")]),
        ("begin; set a.x = 1; commit", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("begin; set local a.x = 1", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("begin; set local a.x = 1; commit", &[("timezone", "'UTC'")]),
        ("begin; set a.x = 1; set local a.x = 2; commit", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("begin; set local a.x = 2; set a.x = 1", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("begin; set a.x = 1; savepoint s; set a.x = 2; rollback to s; commit", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("begin; savepoint s; set a.x = 2; release s; commit", &[("a.x", "2"), ("timezone", "'UTC'")]),
        (
            "begin; savepoint s; set a.x = 1; savepoint s; set a.x = 2; release s; rollback to s; commit",
            &[("timezone", "'UTC'")],
        ),
        ("begin; set a.x = 1; commit and chain; set a.x = 2; rollback", &[("a.x", "1"), ("timezone", "'UTC'")]),
        ("set timezone = 5; reset timezone", &[("timezone", "'UTC'")]),
        ("set timezone = 5; set role x; set a.x = 1; reset all", &[("role", "x"), ("timezone", "'UTC'")]),
        ("set role x; set session authorization y", &[("session_authorization", "y"), ("timezone", "'UTC'")]),
        ("set role x; set a.x = 1; discard all", &[("timezone", "'UTC'")]),
        ("begin; set transaction_isolation = 'serializable'; set seed = 0.1; commit", &[("timezone", "'UTC'")]),
        (
            "set session characteristics as transaction read only, isolation level serializable",
            &[
                ("default_transaction_isolation", "'serializable'"),
                ("default_transaction_read_only", "on"),
                ("timezone", "'UTC'"),
            ],
        ),
    ];
    for (sql, expected) in cases {
        let vars = run(&startup, sql);
        assert_eq!(vars.current(), &set_of(expected), "{sql}");
        assert!(!vars.is_uncertain(), "{sql}");
    }
}

#[test]
fn what_cannot_be_followed_is_uncertain_until_it_is_undone() {
    let many = "savepoint s;".repeat(SAVEPOINTS_MAX + 1);
    let lost = format!("begin; set a.x = 1; {many} rollback to s;");
    assert!(run(&VarSet::default(), &lost).is_uncertain());
    assert!(run(&VarSet::default(), &format!("{lost} commit")).is_uncertain());
    assert!(!run(&VarSet::default(), &format!("{lost} rollback")).is_uncertain());
    assert!(!run(&VarSet::default(), &format!("begin; {many} rollback to s;")).is_uncertain());
    assert!(run(&VarSet::default(), "begin; set a.x = 1; rollback to unseen").is_uncertain());
    let flood = (0..=VARS_MAX).map(|n| format!("set a.x{n} = 1;")).collect::<Vec<_>>().concat();
    assert!(run(&VarSet::default(), &flood).is_uncertain());
    assert!(!run(&VarSet::default(), &format!("{flood} discard all")).is_uncertain());
    let long = format!("set a.x = '{}'", "y".repeat(VALUE_BYTES_MAX));
    assert!(run(&VarSet::default(), &long).is_uncertain());
}

#[test]
fn search_path_is_read_as_names() {
    let vars = run(&VarSet::default(), "set search_path to \"$user\", Public, 'a,b'");
    let expected: Vec<String> = ["$user", "public", "a,b"].map(str::to_owned).into();
    assert_eq!(vars.current().search_path(), Some(expected));
    assert_eq!(VarSet::default().search_path(), None);
}

#[test]
fn a_replay_reads_as_one_would_write_it() {
    let from = set_of(&[("a.x", "1"), ("role", "x"), ("work_mem", "'4MB'")]);
    let to = set_of(&[("role", "'y'"), ("timezone", "interval '1' hour"), ("work_mem", "'4MB'")]);
    assert_eq!(
        replay(&from, &to).as_deref(),
        Some("RESET \"role\";RESET \"a\".\"x\";SET TIME ZONE interval '1' hour;SET \"role\" TO 'y';")
    );
    assert_eq!(replay(&to, &to), None);
}

fn var_sets() -> impl Strategy<Value = VarSet> {
    let names = vec!["a.b", "work_mem", "role", "session_authorization", "search_path", "timezone", "x.select", "w\"x"];
    let values = vec!["1", "'it''s'", "off", r"E'a\\b'", "\"A\", b", "interval '1' hour", "-5"];
    let pair = (proptest::sample::select(names), proptest::sample::select(values));
    proptest::collection::vec(pair, 0..6).prop_map(|pairs| set_of(&pairs))
}

/// The server: settings by name, where setting the session authorization resets the role.
fn model(mut server: VarSet, sql: &str) -> VarSet {
    for class in classes(sql) {
        match class {
            Class::Set { name, value: SetValue::Text(value), scope: Scope::Session } => {
                if name == SESSION_AUTHORIZATION {
                    server.remove(ROLE);
                }
                assert!(server.set(&name, &value));
            }
            Class::Reset(Target::Name(name)) => {
                if name == SESSION_AUTHORIZATION {
                    server.remove(ROLE);
                }
                server.remove(&name);
            }
            other => panic!("{other:?} in {sql}"),
        }
    }
    server
}

proptest! {
    #[test]
    fn a_replay_brings_any_server_to_any_set(from in var_sets(), to in var_sets()) {
        let text = replay(&from, &to).unwrap_or_default();
        prop_assert_eq!(model(from, &text), to);
    }
}
