//! Every class by example, and the traps of the grammar.

use super::*;
use crate::sql::lex::lex;

fn class(sql: &str) -> Class {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
    classify(sql, &tokens)
}

fn check(cases: &[(&str, Class)]) {
    for (sql, expected) in cases {
        assert_eq!(class(sql), *expected, "{sql}");
        let shouted = format!("/* c */ {} -- c\n;", sql.to_ascii_uppercase());
        if !sql.contains(['"', '\'', '$']) {
            assert_eq!(class(&shouted), *expected, "{shouted}");
        }
    }
}

fn named(name: &str) -> String {
    name.to_owned()
}

#[test]
fn transactions() {
    let plain = Modes::default();
    let full = Modes { isolation: Some(Isolation::Serializable), read_only: Some(true), deferrable: Some(true) };
    check(&[
        ("begin", Class::Begin(plain)),
        ("begin work", Class::Begin(plain)),
        ("start transaction", Class::Begin(plain)),
        ("begin transaction isolation level serializable, read only deferrable", Class::Begin(full)),
        (
            "begin not deferrable, read write",
            Class::Begin(Modes { isolation: None, read_only: Some(false), deferrable: Some(false) }),
        ),
        (
            "start transaction isolation level repeatable read",
            Class::Begin(Modes { isolation: Some(Isolation::RepeatableRead), ..plain }),
        ),
        ("commit", Class::Commit { chain: false }),
        ("end transaction and chain", Class::Commit { chain: true }),
        ("commit and no chain", Class::Commit { chain: false }),
        ("abort work", Class::Rollback { chain: false }),
        ("rollback and chain", Class::Rollback { chain: true }),
        ("savepoint a", Class::Savepoint(named("a"))),
        ("release savepoint a", Class::Release(named("a"))),
        ("release savepoint", Class::Release(named("savepoint"))),
        ("rollback work to savepoint \"A\"", Class::RollbackTo(named("A"))),
        ("rollback to a", Class::RollbackTo(named("a"))),
        ("prepare transaction 'x'", Class::PrepareTransaction),
        ("commit prepared 'x'", Class::CommitPrepared),
        ("rollback prepared 'x'", Class::RollbackPrepared),
        ("set transaction read only", Class::SetTransaction(Modes { read_only: Some(true), ..plain })),
        ("set local transaction snapshot '1'", Class::SetTransaction(plain)),
        (
            "set session characteristics as transaction read only",
            Class::SetCharacteristics(Modes { read_only: Some(true), ..plain }),
        ),
        ("set constraints all deferred", Class::SetConstraints),
    ]);
    for broken in [
        "begin foo",
        "commit x",
        "begin read only,",
        "rollback to",
        "commit and",
        "savepoint",
        "savepoint a b",
        "begin isolation level",
    ] {
        assert_eq!(class(broken), Class::Other, "{broken}");
    }
}

fn set(name: &str, value: &str, scope: Scope) -> Class {
    Class::Set { name: named(name), value: SetValue::Text(named(value)), scope }
}

#[test]
fn settings() {
    check(&[
        ("set search_path to a, \"B\" ,'c'", set("search_path", "a, \"B\", 'c'", Scope::Session)),
        ("set session work_mem = '4MB'", set("work_mem", "'4MB'", Scope::Session)),
        ("set local my.\"Var\" = -1.5", set("my.var", "-1.5", Scope::Local)),
        ("set time zone 'UTC'", set("timezone", "'UTC'", Scope::Session)),
        (
            "set time zone interval '-08:00' hour to minute",
            set("timezone", "interval '-08:00' hour to minute", Scope::Session),
        ),
        ("set time zone local", Class::Reset(Target::Name(named("timezone")))),
        ("set names 'utf8'", set("client_encoding", "'utf8'", Scope::Session)),
        ("set names", Class::Reset(Target::Name(named("client_encoding")))),
        ("set role 'x'", set("role", "'x'", Scope::Session)),
        ("set session role none", set("role", "none", Scope::Session)),
        ("set session authorization 'x'", set("session_authorization", "'x'", Scope::Session)),
        (
            "set local session authorization default",
            Class::Set { name: named("session_authorization"), value: SetValue::Default, scope: Scope::Local },
        ),
        ("set session authorization default", Class::Reset(Target::Name(named("session_authorization")))),
        ("set schema 'x'", set("search_path", "'x'", Scope::Session)),
        ("set work_mem to default", Class::Reset(Target::Name(named("work_mem")))),
        ("set sort_mem = 1", set("work_mem", "1", Scope::Session)),
        (r"set a.b = E'a\\b'", set("a.b", r"E'a\\b'", Scope::Session)),
        (r"set a.b = 'a\b'", set("a.b", r"E'a\\b'", Scope::Session)),
        ("set a.b = $$it's$$", set("a.b", "'it''s'", Scope::Session)),
        ("reset all", Class::Reset(Target::All)),
        ("reset role", Class::Reset(Target::Name(named("role")))),
        ("reset time zone", Class::Reset(Target::Name(named("timezone")))),
        ("reset session authorization", Class::Reset(Target::Name(named("session_authorization")))),
        ("reset a.b", Class::Reset(Target::Name(named("a.b")))),
        ("show all", Class::Show),
        ("discard temporary", Class::Discard(Discard::Temp)),
        ("discard all", Class::Discard(Discard::All)),
    ]);
    for broken in ["set", "set x", "set x =", "set x = 1;2", "set x from current", "reset", "discard x", "set x = a.b"]
    {
        assert_eq!(class(broken), Class::Other, "{broken}");
    }
}

#[test]
fn data_statements() {
    check(&[
        ("", Class::Empty),
        (";;", Class::Empty),
        ("select 1", Class::Select),
        ("((select 1) union select 2)", Class::Select),
        ("select 1 as into from t", Class::Select),
        ("select a into temp x from t", Class::SelectInto),
        ("values (1)", Class::Values),
        ("table t", Class::Table),
        ("insert into t select 1", Class::Insert),
        ("update t set a = 1", Class::Update),
        ("delete from t", Class::Delete),
        ("merge into t using s on true when matched then delete", Class::Merge),
        ("with x as (select 1) select 2", Class::With { verb: Verb::Select, writes: false }),
        (
            "with recursive update(a) as not materialized (select 1), delete as (values (1)) table delete",
            Class::With { verb: Verb::Select, writes: false },
        ),
        ("with x as (select 1) (select 2)", Class::With { verb: Verb::Select, writes: false }),
        ("with x as (delete from t returning *) select * from x", Class::With { verb: Verb::Select, writes: true }),
        ("with x as (select 1) insert into t select * from x", Class::With { verb: Verb::Insert, writes: true }),
        ("with x as (select 1) update t set a = 1", Class::With { verb: Verb::Update, writes: true }),
        ("(with x as (select 1) select 2)", Class::With { verb: Verb::Select, writes: false }),
        (
            "with x as (insert into t values (1)) select a into b from x",
            Class::With { verb: Verb::SelectInto, writes: true },
        ),
        ("explain select 1", Class::Explain { analyze: false, inner: 1 }),
        ("explain analyze verbose select 1", Class::Explain { analyze: true, inner: 3 }),
        ("explain (costs off, analyze) select 1", Class::Explain { analyze: true, inner: 7 }),
        ("explain (analyze false) select 1", Class::Explain { analyze: false, inner: 5 }),
        ("explain (select 1)", Class::Explain { analyze: false, inner: 1 }),
        ("call f()", Class::Call),
        ("do $$ begin end $$", Class::Do),
        ("lock table t", Class::Lock),
        ("truncate t", Class::Truncate),
        ("load 'x'", Class::Load),
        (
            "security label on table t is 'x'",
            Class::Ddl(Ddl { transactional: true, what: "SECURITY LABEL", temporary: false }),
        ),
        ("frobnicate", Class::Other),
        ("'x'", Class::Other),
        ("with x", Class::Other),
    ]);
    let locks = |sql: &str| {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        locks_rows(sql, &tokens)
    };
    assert!(locks("select 1 from t for no key update of t"));
    assert!(locks("with x as (select 1 from t for share) select * from x"));
    assert!(!locks("select substring(a for 2) from t"));
}

#[test]
fn cursors_and_prepared_statements() {
    check(&[
        ("declare c cursor for select 1", Class::Declare { name: named("c"), hold: false }),
        (
            "declare \"C\" binary no scroll cursor with hold for select 1",
            Class::Declare { name: named("C"), hold: true },
        ),
        ("fetch forward 5 from c", Class::Fetch { name: named("c") }),
        ("fetch c", Class::Fetch { name: named("c") }),
        ("move absolute -1 in c", Class::Move { name: named("c") }),
        ("close all", Class::CloseCursor(Target::All)),
        ("close c", Class::CloseCursor(Target::Name(named("c")))),
        ("prepare p (int, numeric(1,2)) as select $1", Class::Prepare { name: named("p"), inner: 13 }),
        ("prepare transaction as select 1", Class::Prepare { name: named("transaction"), inner: 3 }),
        ("execute p (1, 2)", Class::Execute { name: named("p") }),
        ("deallocate prepare all", Class::Deallocate(Target::All)),
        ("deallocate prepare", Class::Deallocate(Target::Name(named("prepare")))),
        ("listen \"Ch\"", Class::Listen(named("Ch"))),
        ("unlisten *", Class::Unlisten(Target::All)),
        ("unlisten c", Class::Unlisten(Target::Name(named("c")))),
        ("notify c, 'x'", Class::Notify(named("c"))),
    ]);
    for broken in ["declare c", "close", "fetch", "listen", "prepare p", "prepare p as"] {
        assert_eq!(class(broken), Class::Other, "{broken}");
    }
}

#[test]
fn copies() {
    let copy = |direction, endpoint, relation: Option<(Option<&str>, &str)>| {
        let relation = relation.map(|(schema, name)| CopyRelation { schema: schema.map(named), name: named(name) });
        Class::Copy(Copy { direction, endpoint, relation })
    };
    use {CopyDirection::*, CopyEndpoint::*};
    check(&[
        ("copy t from stdin", copy(From, Stdin, Some((None, "t")))),
        ("copy s.t (a, b) from stdout with (format csv)", copy(From, Stdin, Some((Some("s"), "t")))),
        ("copy binary t to stdout", copy(To, Stdout, Some((None, "t")))),
        ("copy \"binary\" to stdout", copy(To, Stdout, Some((None, "binary")))),
        ("copy binary to stdout", Class::Other),
        ("copy (select 1 from t) to stdout", copy(To, Stdout, None)),
        ("copy t to '/x'", copy(To, File, Some((None, "t")))),
        ("copy t from program 'x'", copy(From, Program, Some((None, "t")))),
        ("copy t", Class::Other),
    ]);
}

#[test]
fn definitions() {
    let ddl = |what, transactional| Class::Ddl(Ddl { transactional, what, temporary: false });
    check(&[
        ("create table t (a int)", ddl("CREATE TABLE", true)),
        ("create temp table t (a int)", Class::Ddl(Ddl { transactional: true, what: "CREATE TABLE", temporary: true })),
        (
            "create or replace temporary view v as select 1",
            Class::Ddl(Ddl { transactional: true, what: "CREATE VIEW", temporary: true }),
        ),
        ("create unique index concurrently i on t (a)", ddl("CREATE INDEX", false)),
        ("create index i on t (a)", ddl("CREATE INDEX", true)),
        ("drop index concurrently i", ddl("DROP INDEX", false)),
        ("alter table t detach partition p concurrently", ddl("ALTER TABLE", false)),
        ("refresh materialized view concurrently v", ddl("REFRESH MATERIALIZED VIEW", true)),
        ("create materialized view v as select 1", ddl("CREATE MATERIALIZED VIEW", true)),
        ("reindex table t", ddl("REINDEX", true)),
        ("reindex (verbose) database d", ddl("REINDEX", false)),
        ("reindex index concurrently i", ddl("REINDEX", false)),
        ("vacuum full t", ddl("VACUUM", false)),
        ("analyze t", ddl("ANALYZE", true)),
        ("cluster", ddl("CLUSTER", false)),
        ("cluster t", ddl("CLUSTER", true)),
        ("create database d", ddl("CREATE DATABASE", false)),
        ("alter database d set work_mem = 1", ddl("ALTER DATABASE", true)),
        ("alter database d set tablespace x", ddl("ALTER DATABASE", false)),
        ("alter system set x = 1", ddl("ALTER SYSTEM", false)),
        ("create subscription s", ddl("CREATE SUBSCRIPTION", false)),
        ("create user mapping for x server y", ddl("CREATE USER MAPPING", true)),
        ("create user x", ddl("CREATE ROLE", true)),
        ("drop foreign table t", ddl("DROP FOREIGN TABLE", true)),
        ("create event trigger x", ddl("CREATE EVENT TRIGGER", true)),
        ("create access method m", ddl("CREATE", true)),
        ("grant select on t to x", ddl("GRANT", true)),
    ]);
}

proptest::proptest! {
    #[test]
    fn any_words_in_any_order_get_a_class(words in proptest::collection::vec(proptest::sample::select(vec![
        "begin", "set", "local", "session", "to", "=", "(", ")", ",", "with", "as", "select", "insert", "explain", "analyze",
        "copy", "from", "prepare", "fetch", "declare", "cursor", "for", "reset", "create", "temp", "table", "x", ".", "'y'",
        "rollback", "and", "chain", "close", "all", "move", ";", "reindex", "-", "time", "zone", "savepoint", "release",
    ]), 0..8)) {
        let _ = class(&words.join(" "));
    }
}
