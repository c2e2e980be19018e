//! What the matrix is made of: tables, roles, statements, and the sessions that ask them.
//!
//! Each [`Axis`] varies one thing that shapes a result. Its sessions ask the same statements, and get different answers: who
//! were given another's would show it.

use super::{Ask, Param, Seat};

/// One thing that shapes a result.
pub struct Axis {
    pub name: &'static str,
    pub seats: Vec<Seat>,
    pub asks: &'static [Ask],
    /// Postgres itself gives its sessions different answers; an axis where it does not cannot fail.
    pub differs: bool,
}

/// Run on the primary by its superuser. `ann` may read most things, `bob` next to nothing, `keeper` owns what has policies.
pub const SCHEMA: &str = r#"
    CREATE ROLE ann LOGIN PASSWORD 'pencil'; CREATE ROLE bob LOGIN PASSWORD 'pencil'; CREATE ROLE readers;
    CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'pencil'; CREATE ROLE auditor LOGIN BYPASSRLS PASSWORD 'pencil';
    CREATE ROLE keeper; CREATE ROLE german LOGIN PASSWORD 'pencil'; CREATE ROLE tenant LOGIN PASSWORD 'pencil';
    GRANT readers TO ann; GRANT ann, bob, german, keeper TO shop;
    ALTER ROLE german SET datestyle = 'German, DMY'; ALTER ROLE german IN DATABASE shop SET timezone = 'Asia/Kolkata';
    ALTER ROLE tenant SET app.tenant = 'two'; ALTER DATABASE shop SET app.tenant = 'one';
    -- What a Parse warns of is told by the server that parses, which weir asks once for many.
    ALTER DATABASE shop SET escape_string_warning = off;
    CREATE SCHEMA a; CREATE SCHEMA b; CREATE SCHEMA ann; GRANT USAGE ON SCHEMA a, b, ann TO PUBLIC;
    CREATE TYPE mood AS ENUM ('glad', 'sad');
    CREATE TABLE shapes (id int PRIMARY KEY, d date, at timestamp, atz timestamptz, span interval, f float8, r real,
        cash money, raw bytea, t text, mood mood, during tstzrange, list float8[], doc jsonb, n numeric(10, 2), nothing text);
    INSERT INTO shapes VALUES
        (1, '2024-02-01', '2024-02-01 13:14:15.678', '2024-03-31 00:30Z', '1 year 2 months -3 days 04:05:06.7', 0.1 + 0.2,
         1.0 / 3, 1234.5, '\x00ff5c27', 'a cat, cats', 'glad', '[2024-01-01 00:00Z, 2024-07-01 00:00Z)', '{0.3, 1e-7}',
         '{"a": 1.50}', 12.30, NULL),
        (2, '2024-12-31', '0044-03-15 BC', '1900-01-01 00:00Z', '-1 day -02:03:04', 1e300 / 3, -0.0, -5, 'plain', U&'caf\00e9',
         'sad', 'empty', '{}', '[]', -0.5, ''),
        (3, 'infinity', '-infinity', 'infinity', '0', 'NaN', 'Infinity', 0, '', '<a>b</a>', NULL, NULL, NULL, NULL, NULL, 'x');
    ALTER TABLE shapes OWNER TO shop; GRANT SELECT ON shapes TO ann, auditor, german;
    CREATE TABLE partly (id int PRIMARY KEY, open text, secret text); INSERT INTO partly VALUES (1, 'open', 'secret');
    ALTER TABLE partly OWNER TO shop; GRANT SELECT (id, open) ON partly TO ann;
    CREATE TABLE grouped (id int PRIMARY KEY, what text); INSERT INTO grouped VALUES (1, 'for readers');
    ALTER TABLE grouped OWNER TO keeper; GRANT SELECT ON grouped TO readers;
    CREATE TABLE public.notes (what text); CREATE TABLE a.notes (what text); CREATE TABLE b.notes (what varchar(9), more int);
    CREATE TABLE ann.notes (what text);
    INSERT INTO public.notes VALUES ('public'); INSERT INTO a.notes VALUES ('a'); INSERT INTO b.notes VALUES ('b', 1);
    INSERT INTO ann.notes VALUES ('of ann'); GRANT SELECT ON public.notes, a.notes, b.notes, ann.notes TO PUBLIC;
    CREATE TABLE owned (id int PRIMARY KEY, owner name, what text);
    INSERT INTO owned VALUES (1, 'ann', 'anns'), (2, 'bob', 'bobs'), (3, 'shop', 'shops');
    ALTER TABLE owned ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON owned USING (owner = current_user);
    CREATE TABLE tenants (id int PRIMARY KEY, tenant text, what text);
    INSERT INTO tenants VALUES (1, 'one', 'first'), (2, 'two', 'second');
    ALTER TABLE tenants ENABLE ROW LEVEL SECURITY; ALTER TABLE tenants FORCE ROW LEVEL SECURITY;
    CREATE POLICY tenant ON tenants USING (tenant = current_setting('app.tenant', true));
    CREATE VIEW by_definer AS SELECT * FROM owned; CREATE VIEW by_invoker WITH (security_invoker) AS SELECT * FROM owned;
    ALTER TABLE owned OWNER TO keeper; ALTER TABLE tenants OWNER TO keeper; ALTER VIEW by_definer OWNER TO ann;
    ALTER VIEW by_invoker OWNER TO keeper; GRANT SELECT ON owned, tenants, by_definer, by_invoker TO PUBLIC;
    CREATE FUNCTION mine() RETURNS SETOF owned LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public
        AS 'SELECT * FROM owned ORDER BY id';
    ALTER FUNCTION mine() OWNER TO bob;"#;

const fn ask(sql: &'static str, columns: usize) -> Ask {
    Ask { sql, columns, params: &[] }
}

const fn given(sql: &'static str, columns: usize, params: &'static [Param]) -> Ask {
    Ask { sql, columns, params }
}

const fn text(type_oid: u32, value: &'static str) -> Param {
    Param { type_oid, binary: false, value: Some(value.as_bytes()) }
}

const EVERYTHING: Ask = ask("SELECT * FROM shapes ORDER BY id", 16);
const AS_TEXT: Ask = ask(
    "SELECT id, d::text, at::text, atz::text, span::text, f::text, r::text, raw::text, during::text, list::text \
     FROM shapes ORDER BY id",
    10,
);
const DATES: &[Ask] = &[EVERYTHING, AS_TEXT, ask("SELECT id FROM shapes WHERE d = '01/02/2024'", 1)];
const SPANS: &[Ask] =
    &[EVERYTHING, AS_TEXT, ask("SELECT id, '-1 2:03:04'::interval AS given FROM shapes ORDER BY id", 2)];
const TIMES: &[Ask] = &[
    EVERYTHING,
    ask("SELECT id FROM shapes WHERE atz < '2024-03-31 02:00' ORDER BY id", 1),
    given("SELECT id, $1::timestamptz AS given FROM shapes WHERE id = 1", 2, &[text(25, "2024-07-01 12:00")]),
    given("SELECT id FROM shapes WHERE atz >= $1 ORDER BY id", 1, &[text(0, "2024-03-31 02:00")]),
];
const SHOWN: &[Ask] = &[EVERYTHING, AS_TEXT];
const ENCODED: &[Ask] = &[
    EVERYTHING,
    ask("SELECT id FROM shapes WHERE t = 'café'", 1),
    ask("SELECT id AS \"café\" FROM shapes WHERE id = 2", 1),
    given("SELECT id, $1::text AS given FROM shapes WHERE t <> $1 ORDER BY id", 2, &[text(25, "café")]),
];
const FORMATTED: &[Ask] = &[ask(
    "SELECT id, cash, to_char(n, 'L9D99') AS n, to_char(d, 'TMMonth') AS month FROM shapes WHERE id < 3 ORDER BY id",
    4,
)];
const XML: &[Ask] = &[
    ask("SELECT id, xmlforest(raw AS raw) FROM shapes ORDER BY id", 2),
    ask("SELECT id, t::xml FROM shapes WHERE id = 1", 2),
    ask("SELECT id, t::xml FROM shapes WHERE id = 3", 2),
];
const NOTES: &[Ask] = &[
    ask("SELECT * FROM notes", 1),
    ask("SELECT what FROM notes", 1),
    given("SELECT what FROM notes WHERE what <> $1", 1, &[text(0, "none")]),
];
const SEARCHED: &[Ask] = &[
    ask("SELECT id, to_tsvector(t) AS words FROM shapes WHERE id = 1", 2),
    ask("SELECT id FROM shapes WHERE t @@ 'cats' ORDER BY id", 1),
    ask("SELECT id FROM shapes WHERE to_tsvector(t) @@ to_tsquery('the & cat') ORDER BY id", 1),
];
const STRINGS: &[Ask] = &[
    ask(r"SELECT id, 'a\tb\\c' AS given FROM shapes ORDER BY id", 2),
    ask(r"SELECT id FROM shapes WHERE raw = '\\x00ff5c27'", 1),
];
const NULLS: &[Ask] = &[
    ask("SELECT id FROM shapes WHERE nothing = NULL", 1),
    ask("SELECT id, '{1,NULL}'::text[] AS given FROM shapes ORDER BY id", 2),
];
const ABBREVIATED: &[Ask] =
    &[ask("SELECT id, '2024-01-01 00:00 EST'::timestamptz AS given FROM shapes ORDER BY id", 2)];
const OWNED: &[Ask] = &[
    ask("SELECT * FROM owned ORDER BY id", 3),
    ask("SELECT * FROM by_definer ORDER BY id", 3),
    ask("SELECT * FROM by_invoker ORDER BY id", 3),
    ask("SELECT * FROM mine()", 3),
    given("SELECT what FROM owned WHERE id = $1", 1, &[text(23, "2")]),
];
const TENANTS: &[Ask] = &[
    ask("SELECT * FROM tenants ORDER BY id", 3),
    ask("SELECT count(*) FROM tenants", 1),
    given("SELECT what FROM tenants WHERE id = $1", 1, &[text(23, "2")]),
];
const RIGHTS: &[Ask] = &[
    ask("SELECT id, t FROM shapes ORDER BY id", 2),
    given("SELECT id, t FROM shapes WHERE id = $1", 2, &[text(23, "1")]),
    ask("SELECT id, open FROM partly", 2),
    ask("SELECT * FROM partly", 3),
    ask("SELECT what FROM grouped", 1),
    ask("SELECT what FROM notes", 1),
    ask("SELECT id, current_user, session_user FROM shapes ORDER BY id", 3),
];
const GIVEN: &str = "SELECT id, $1 AS given FROM shapes ORDER BY id";
const COMPARED: &str = "SELECT id, t FROM shapes WHERE id = $1";
const PARAMETERS: &[Ask] = &[
    given(GIVEN, 2, &[text(23, "1")]),
    given(GIVEN, 2, &[text(20, "1")]),
    given(GIVEN, 2, &[text(25, "1")]),
    given(GIVEN, 2, &[text(0, "1")]),
    given(GIVEN, 2, &[text(0, "")]),
    given(GIVEN, 2, &[text(23, "0001")]),
    given(GIVEN, 2, &[Param { type_oid: 23, binary: true, value: Some(b"0001") }]),
    given(GIVEN, 2, &[Param { type_oid: 25, binary: false, value: None }]),
    given(GIVEN, 2, &[Param { type_oid: 25, binary: false, value: Some(b"") }]),
    given(COMPARED, 2, &[text(23, "1")]),
    given(COMPARED, 2, &[text(23, "2")]),
    given(COMPARED, 2, &[text(23, "x")]),
    given(COMPARED, 2, &[text(0, "2")]),
    given(COMPARED, 2, &[Param { type_oid: 23, binary: true, value: Some(b"\0\0\0\x01") }]),
    given(COMPARED, 2, &[Param { type_oid: 23, binary: false, value: None }]),
    ask("SELECT id, t FROM shapes WHERE id = 1", 2),
    ask("SELECT id, t FROM shapes WHERE id = 2", 2),
    ask("SELECT id, t FROM shapes WHERE id = '2'", 2),
    ask("SELECT id, t AS \"T\" FROM shapes WHERE id = 2", 2),
    ask("SELECT id, t AS t FROM shapes WHERE id = 2.0", 2),
    ask("SELECT id, 1 AS given FROM shapes ORDER BY id", 2),
    ask("SELECT id, 1.0 AS given FROM shapes ORDER BY id", 2),
    ask("SELECT id, '1' AS given FROM shapes ORDER BY id", 2),
];

/// Every way of giving `name` the value `value`, and some of giving it and taking it back.
fn ways(name: &str, value: &str) -> Vec<Seat> {
    let set = format!("SET {name} TO '{value}'");
    let list = name == "search_path";
    let set = if list { format!("SET {name} TO {value}") } else { set };
    let said = |before: &[&str]| {
        let before: Vec<String> = before.iter().map(|sql| (*sql).to_owned()).collect();
        Seat { before, ..Seat::of("shop") }
    };
    let local = set.replacen("SET", "SET LOCAL", 1);
    let mut seats = vec![
        said(&[&set]),
        Seat { startup: vec![(name.to_owned(), value.to_owned())], ..Seat::of("shop") },
        Seat {
            startup: vec![("options".to_owned(), format!("-c {name}={}", value.replace(' ', "\\ ")))],
            ..Seat::of("shop")
        },
        said(&[&format!("SELECT set_config('{name}', '{value}', false)")]),
        said(&["BEGIN", &set, "COMMIT"]),
        said(&["BEGIN", &set, "ROLLBACK"]),
        said(&["BEGIN", &local, "COMMIT"]),
        said(&["BEGIN", "SAVEPOINT s", &set, "ROLLBACK TO s", "COMMIT"]),
        said(&["BEGIN", &format!("SELECT set_config('{name}', '{value}', true)"), "COMMIT"]),
        said(&[&set, &format!("RESET {name}")]),
        said(&[&set, &format!("SET {name} TO DEFAULT")]),
        said(&[&set, "RESET ALL"]),
        said(&[&set, "DISCARD ALL"]),
        said(&[&format!("{set}; SELECT 1")]),
    ];
    if !name.contains('.') {
        seats.push(said(&[&format!("UPDATE pg_settings SET setting = '{value}' WHERE name = '{name}'")]));
    }
    seats
}

/// Ways of one setting that are tried: every way is tried with some, and every way with the first.
const WAYS: usize = 4;

/// One setting: the default, ways of the first value, and the others by SET. `number`: its place among the settings.
fn setting(number: usize, (name, values, asks): (&'static str, &[&str], &'static [Ask])) -> Axis {
    let mut seats = vec![Seat::of("shop")];
    if let Some((first, others)) = values.split_first() {
        let all = ways(name, first);
        let turn = |place: usize| number == 0 || place == 0 || place % WAYS == number % WAYS;
        seats.extend(all.into_iter().enumerate().filter(|(place, _)| turn(*place)).map(|(_, seat)| seat));
        seats.extend(others.iter().filter_map(|value| ways(name, value).into_iter().next()));
    }
    Axis { name, seats, asks, differs: true }
}

/// Settings and their values, for the axes and for random sessions.
pub const SETTINGS: &[(&str, &[&str], &[Ask])] = &[
    ("datestyle", &["German, DMY", "SQL, DMY", "SQL, MDY", "Postgres, MDY", "ISO, DMY"], DATES),
    ("intervalstyle", &["iso_8601", "sql_standard", "postgres_verbose"], SPANS),
    ("timezone", &["America/New_York", "Asia/Kolkata", "UTC", "<+03>-03"], TIMES),
    ("extra_float_digits", &["0", "-10", "3"], SHOWN),
    ("bytea_output", &["escape"], SHOWN),
    ("client_encoding", &["LATIN1", "SQL_ASCII", "WIN1252"], ENCODED),
    ("search_path", &["a", "b, a", "ann", "a, public", "pg_catalog"], NOTES),
    ("default_text_search_config", &["pg_catalog.simple", "pg_catalog.german"], SEARCHED),
    ("standard_conforming_strings", &["off"], STRINGS),
    ("transform_null_equals", &["on"], NULLS),
    ("array_nulls", &["off"], NULLS),
    ("timezone_abbreviations", &["Australia"], ABBREVIATED),
    ("xmlbinary", &["hex"], XML),
    ("xmloption", &["document"], XML),
    ("row_security", &["off"], OWNED),
    ("app.tenant", &["two", "three"], TENANTS),
    ("lc_monetary", &["C", "C.UTF-8"], FORMATTED),
    ("lc_numeric", &["C", "C.UTF-8"], FORMATTED),
    ("lc_time", &["C", "C.UTF-8"], FORMATTED),
];

/// Only the C locales are everywhere, and they format alike.
const ALIKE: [&str; 3] = ["lc_monetary", "lc_numeric", "lc_time"];

/// Other spellings of SET.
fn spellings() -> Axis {
    let texts: &[&[&str]] = &[
        &["SET TIME ZONE 'Asia/Kolkata'"],
        &["SET TIME ZONE INTERVAL '-08:30' HOUR TO MINUTE"],
        &["SET TIME ZONE -7"],
        &["SET TIME ZONE LOCAL"],
        &["SET SESSION TIME ZONE DEFAULT"],
        &["SET TIME ZONE 'Asia/Kolkata'", "SET TIME ZONE DEFAULT"],
        &["SET datestyle TO SQL", "SET datestyle TO DMY"],
        &["SET datestyle = German, DMY"],
        &["SET datestyle TO DMY"],
        &["SET NAMES 'LATIN1'"],
        &["SET NAMES 'LATIN1'", "SET NAMES DEFAULT"],
        &["SET SCHEMA 'a'"],
        &["SET XML OPTION DOCUMENT"],
        &["SET SESSION \"TimeZone\" TO 'Asia/Kolkata'"],
        &["SET timezone FROM CURRENT"],
        &["DO $$ BEGIN SET timezone = 'Asia/Kolkata'; END $$"],
        &["BEGIN; SET timezone = 'Asia/Kolkata'; COMMIT"],
        &["SET timezone = 'Nowhere/Atall'"],
    ];
    let seats = texts
        .iter()
        .map(|before| Seat { before: before.iter().map(|sql| (*sql).to_owned()).collect(), ..Seat::of("shop") });
    Axis { name: "spellings of SET", seats: seats.collect(), asks: DATES, differs: true }
}

/// Ways of being somebody.
pub fn people() -> Vec<Seat> {
    let as_role = |user: &'static str, before: &[&str]| Seat {
        before: before.iter().map(|sql| (*sql).to_owned()).collect(),
        ..Seat::of(user)
    };
    let started =
        |user, name: &str, value: &str| Seat { startup: vec![(name.to_owned(), value.to_owned())], ..Seat::of(user) };
    vec![
        Seat::of("shop"),
        Seat::of("ann"),
        Seat::of("bob"),
        Seat::of("boss"),
        Seat::of("auditor"),
        Seat::of("german"),
        Seat::of("tenant"),
        as_role("shop", &["SET ROLE ann"]),
        as_role("shop", &["SET ROLE bob"]),
        as_role("shop", &["SET ROLE keeper"]),
        as_role("shop", &["SET ROLE ann", "RESET ROLE"]),
        as_role("shop", &["SET ROLE ann", "SET ROLE NONE"]),
        as_role("shop", &["BEGIN", "SET LOCAL ROLE ann", "COMMIT"]),
        as_role("ann", &["SET ROLE readers"]),
        as_role("ann", &["SET ROLE boss"]),
        as_role("boss", &["SET SESSION AUTHORIZATION ann"]),
        as_role("boss", &["SET SESSION AUTHORIZATION ann", "SET ROLE readers"]),
        as_role("boss", &["SET SESSION AUTHORIZATION ann", "RESET SESSION AUTHORIZATION"]),
        as_role("boss", &["SET ROLE bob", "SET SESSION AUTHORIZATION DEFAULT"]),
        as_role("boss", &["SET SESSION AUTHORIZATION bob", "DISCARD ALL"]),
        as_role("boss", &["SELECT set_config('role', 'bob', false)"]),
        started("ann", "role", "readers"),
        started("shop", "options", "-c role=bob"),
        started("boss", "session_authorization", "ann"),
    ]
}

/// Everything.
pub fn all() -> Vec<Axis> {
    let settings = SETTINGS
        .iter()
        .enumerate()
        .map(|(number, each)| Axis { differs: !ALIKE.contains(&each.0), ..setting(number, *each) });
    let roles = |name, asks| Axis { name, seats: people(), asks, differs: true };
    let mut all: Vec<Axis> = settings.collect();
    all.extend([
        spellings(),
        roles("rights of roles", RIGHTS),
        roles("policies by role", OWNED),
        roles("policies by setting", TENANTS),
        Axis { name: "statement and parameters", seats: vec![Seat::of("shop")], asks: PARAMETERS, differs: true },
    ]);
    all
}
