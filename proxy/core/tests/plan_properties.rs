//! What must hold of every plan, whatever the statement.

mod plan_fixture;

use plan_fixture::Fixture;
use proptest::prelude::*;
use weir_core::plan::{Access, Datum, Plan, Target, Values};
use weir_core::sql::lex::lex;
use weir_core::topology::Key;

fn bind(fixture: &Fixture, sql: &str, params: &[Datum<'_>]) -> Result<Plan, weir_core::error::UserError> {
    let (compiled, normal) = fixture.compile(sql);
    let values = Values { params, sql, literals: &normal.literals };
    compiled.template.bind(&values, &fixture.topology)
}

/// Spellings of a condition that binds a bigint key to `$1` or to a literal.
fn spelling(kind: usize, value: i64) -> (String, bool) {
    match kind {
        0 => ("u.user_id = $1".into(), true),
        1 => ("$1 = user_id".into(), true),
        2 => ("(u.user_id) IN ($1)".into(), true),
        3 => ("user_id = $1::bigint AND name <> 'x'".into(), true),
        4 => (format!("user_id = {value}"), false),
        5 => (format!("user_id = '{value}'"), false),
        6 => (format!("user_id = any('{{{value}}}')"), false),
        7 => (format!("user_id = any(array[{value}])"), false),
        8 => (format!("(user_id, name) = ({value}, 'x')"), false),
        _ => (format!("(user_id = {value} AND name = 'a') OR (name = 'b' AND user_id = {value})"), false),
    }
}

proptest! {
    #[test]
    fn a_key_goes_to_the_shard_of_its_hash(value in any::<i64>(), kind in 0..10_usize, binary in any::<bool>(), shards in 1..5_u32) {
        let fixture = Fixture::storefront(1 << shards);
        let (condition, parameter) = spelling(kind, value);
        // The smallest bigint cannot be written as a literal with a minus in front: its digits are out of range.
        prop_assume!(parameter || value != i64::MIN);
        let sql = format!("SELECT u.name FROM users AS u WHERE {condition}");
        let bytes = value.to_be_bytes();
        let text = value.to_string();
        let datum = if binary { Datum::Binary(&bytes) } else { Datum::Text(text.as_bytes()) };
        let params = [datum];
        let plan = bind(&fixture, &sql, if parameter { &params } else { &[] }).expect("a plan");
        prop_assert_eq!(plan.target, Target::One(fixture.topology.shard_of(&Key::Int(value))));
        prop_assert_eq!(plan.access, Access::Read);
    }

    #[test]
    fn a_text_key_goes_to_the_shard_of_its_hash(value in "[^\\x00]{0,40}") {
        let fixture = Fixture::storefront(8);
        let owner = Target::One(fixture.topology.shard_of(&Key::Text(value.as_bytes().into())));
        let literal = format!("SELECT user_id FROM user_emails WHERE email = '{}'", value.replace('\'', "''"));
        prop_assert_eq!(&bind(&fixture, &literal, &[]).expect("a plan").target, &owner);
        for datum in [Datum::Text(value.as_bytes()), Datum::Binary(value.as_bytes())] {
            let plan = bind(&fixture, "SELECT user_id FROM user_emails WHERE email = $1", &[datum]).expect("a plan");
            prop_assert_eq!(&plan.target, &owner);
        }
        let array = format!("{{\"{}\"}}", value.replace('\\', "\\\\").replace('"', "\\\""));
        let datum = Datum::Text(array.as_bytes());
        let plan = bind(&fixture, "SELECT user_id FROM user_emails WHERE email = ANY($1)", &[datum]).expect("a plan");
        prop_assert_eq!(&plan.target, &owner);
    }

    #[test]
    fn a_list_goes_to_exactly_the_shards_of_its_keys(values in prop::collection::vec(any::<i64>(), 0..20)) {
        let fixture = Fixture::storefront(8);
        let mut owners: Vec<_> = values.iter().map(|value| fixture.topology.shard_of(&Key::Int(*value))).collect();
        owners.sort();
        owners.dedup();
        let mut array: Vec<u8> = [1_i32, 0, 20, values.len() as i32, 1].iter().flat_map(|word| word.to_be_bytes()).collect();
        for value in &values {
            array.extend(8_i32.to_be_bytes());
            array.extend(value.to_be_bytes());
        }
        let plan = bind(&fixture, "SELECT * FROM users WHERE user_id = ANY($1)", &[Datum::Binary(&array)]).expect("a plan");
        match plan.target {
            Target::One(shard) => prop_assert!(owners.is_empty() || owners == [shard]),
            Target::Many(shards) => prop_assert_eq!(shards.to_vec(), owners),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    /// Each row goes to the owner of its key and to no other shard, and the parts together are the whole.
    #[test]
    fn every_row_of_an_insert_goes_to_exactly_one_shard(
        rows in prop::collection::vec((any::<i32>(), 0..4_usize, "[a-z,()' ]{0,6}"), 2..40),
        tail in prop::sample::select(&["", " ON CONFLICT DO NOTHING", " RETURNING *;", " ON CONFLICT (user_id) DO UPDATE SET name = 'x' -- end"][..]),
    ) {
        let fixture = Fixture::storefront(4);
        let mut params: Vec<String> = Vec::new();
        let written: Vec<String> = rows.iter().map(|(key, kind, name)| {
            let key = match kind {
                0 => key.to_string(),
                1 => format!("'{key}'"),
                2 => format!("'{key}'::bigint"),
                _ => {
                    params.push(key.to_string());
                    format!("${}", params.len())
                }
            };
            format!("({key}, '{}')", name.replace('\'', "''"))
        }).collect();
        let sql = format!("INSERT INTO users (user_id, name) VALUES {}{tail}", written.join(" , "));
        let datums: Vec<Datum<'_>> = params.iter().map(|text| Datum::Text(text.as_bytes())).collect();
        let plan = bind(&fixture, &sql, &datums).expect("a plan");
        let owner = |key: i32| fixture.topology.shard_of(&Key::Int(i64::from(key)));
        let Some(dealt) = plan.dealt else {
            prop_assert_eq!(plan.target, Target::One(owner(rows[0].0)));
            prop_assert!(rows.iter().all(|row| owner(row.0) == owner(rows[0].0)));
            return Ok(());
        };
        let Target::Many(shards) = plan.target else { panic!("several shards") };
        let mut tokens = Vec::new();
        lex(&sql, &mut tokens).expect("lexes");
        let mut seen = 0;
        for shard in shards {
            let part = dealt.deal.rows.keep(&sql, &tokens, |row| dealt.owners[row] == shard, "");
            let mine: Vec<&str> =
                written.iter().zip(&rows).filter(|(_, row)| owner(row.0) == shard).map(|(text, _)| &**text).collect();
            prop_assert!(!mine.is_empty());
            seen += mine.len();
            let tail = tail.trim_end_matches(';').split(" --").next().unwrap_or_default();
            prop_assert_eq!(part, format!("INSERT INTO users (user_id, name) VALUES {}{tail}", mine.join(", ")));
        }
        prop_assert_eq!(seen, rows.len());
    }

    #[test]
    fn random_text_never_panics(words in prop::collection::vec(prop::sample::select(WORDS), 0..30)) {
        let fixture = Fixture::storefront(4);
        let sql = words.join(" ");
        if lex(&sql, &mut Vec::new()).is_ok() {
            let _ = bind(&fixture, &sql, &[Datum::Text(b"1"), Datum::Null]);
        }
    }
}

const WORDS: &[&str] = &[
    "SELECT",
    "*",
    "FROM",
    "orders",
    "users",
    "WHERE",
    "user_id",
    "=",
    "1",
    "$1",
    "$2",
    "(",
    ")",
    ",",
    "GROUP BY",
    "ORDER BY",
    "LIMIT",
    "OFFSET",
    "count(*)",
    "sum(qty)",
    "JOIN",
    "LEFT JOIN",
    "USING",
    "ON",
    "AND",
    "OR",
    "NOT",
    "IN",
    "products",
    "o",
    "WITH",
    "AS",
    "INSERT INTO",
    "VALUES",
    "UPDATE",
    "SET",
    "DELETE FROM",
    "RETURNING",
    "'x'",
    "ANY",
    "EXISTS",
    "UNION ALL",
    "DISTINCT",
    "::int8",
    "HAVING",
    "FOR UPDATE",
    "EXPLAIN",
    "DECLARE c CURSOR FOR",
    "COPY",
    "TO STDOUT",
    ";",
    ".",
    "-",
    "NULL",
];

#[test]
fn with_one_shard_nothing_is_refused() {
    let fixture = Fixture::storefront(1);
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/plan");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).expect("golden directory") {
        #[allow(clippy::disallowed_methods)] // a test reads its own data
        let text = std::fs::read_to_string(entry.expect("entry").path()).expect("golden file");
        for block in text.split("\n\n") {
            let Some(sql) = block.lines().find(|line| !line.is_empty() && !line.starts_with('#')) else { continue };
            let plan =
                bind(&fixture, sql, &[Datum::Text(b"1"), Datum::Text(b"1"), Datum::Text(b"1"), Datum::Text(b"1")])
                    .unwrap_or_else(|error| panic!("{sql}: {error}"));
            assert_eq!(plan.target, Target::Home, "{sql}");
            assert_eq!(plan.merge, None, "{sql}");
            seen += 1;
        }
    }
    assert!(seen > 200, "only {seen} statements were found");
}

#[test]
fn a_key_parameter_of_uncertain_type_is_not_read_in_binary() {
    let fixture = Fixture::storefront(4);
    // numeric > $1 makes the server choose numeric for $1; a float8 would have eight bytes, like a bigint.
    let sql = "SELECT * FROM users WHERE length(name) / 2.5 > $1 AND user_id = $1";
    let bytes = 42_f64.to_be_bytes();
    let error = bind(&fixture, sql, &[Datum::Binary(&bytes)]).expect_err("uncertain");
    assert_eq!(error.sqlstate, "0A000");
    assert!(bind(&fixture, sql, &[Datum::Text(b"42")]).is_ok(), "text means the same in every type");
    assert!(bind(&fixture, "SELECT * FROM users WHERE user_id = $1", &[Datum::Binary(&42_i32.to_be_bytes())]).is_ok());
    assert!(bind(&fixture, "SELECT * FROM users WHERE user_id = $1", &[Datum::Binary(b"123")]).is_err(), "no integer");
}

#[test]
fn declared_types_are_checked_against_keys() {
    let fixture = Fixture::storefront(4);
    let (compiled, _) = fixture.compile("SELECT * FROM users WHERE user_id = $1");
    for fits in [&[][..], &[0], &[20], &[21], &[23]] {
        assert!(compiled.template.check_types(fits).is_ok(), "{fits:?}");
    }
    for other in [25, 701, 1700, 1042] {
        assert!(compiled.template.check_types(&[other]).is_err(), "{other}");
    }
    let (compiled, _) = fixture.compile("SELECT * FROM users WHERE user_id = ANY($1)");
    assert!(compiled.template.check_types(&[1016]).is_ok());
    assert!(compiled.template.check_types(&[20]).is_err());
}

#[test]
fn deep_and_long_statements_are_turned_away_unparsed() {
    let fixture = Fixture::storefront(4);
    let deep = format!("SELECT {}1{} FROM users", "(".repeat(5_000), ")".repeat(5_000));
    let chained = format!("SELECT 1{} FROM users", "+1".repeat(10_000));
    let ors = format!("SELECT * FROM users WHERE {} user_id = 2", "user_id = 1 OR ".repeat(2_100));
    let minus = format!("SELECT {}1 FROM users", "- ".repeat(10_000));
    let nots = format!("SELECT {}true FROM users", "not ".repeat(2_500));
    let casts = format!("SELECT 1{} FROM users", "::int".repeat(6_000));
    let isnull = format!("SELECT 1{} FROM users", " isnull".repeat(4_000));
    let unions =
        format!("SELECT 1 FROM users{}", " union all select 1".repeat(1_600)).replace("all select 1", "select 1");
    let unions = format!("{unions}{}", " union select 1".repeat(500));
    for sql in [deep, chained, ors, minus, nots, casts, isnull, unions] {
        let error = bind(&fixture, &sql, &[]).expect_err("sharded and not parsed");
        assert_eq!(error.sqlstate, "0A000");
    }
}

#[test]
fn what_is_just_short_enough_is_parsed_without_overflow() {
    let fixture = Fixture::storefront(4);
    let chained = format!("SELECT 1{} FROM users WHERE user_id = 42", "+1".repeat(1_900));
    let ors = format!("SELECT * FROM users WHERE user_id = 42{}", " OR user_id = 42".repeat(990));
    let ands = format!("SELECT * FROM users WHERE user_id = 42{}", " AND active".repeat(1_900));
    let casts = format!("SELECT 1{} FROM users WHERE user_id = 42", "::int".repeat(1_900));
    let isnull = format!("SELECT 1{} FROM users WHERE user_id = 42", " isnull".repeat(1_900));
    let nots = format!("SELECT {}true FROM users WHERE user_id = 42", "not ".repeat(1_900));
    let unions = format!("SELECT 1 FROM users WHERE user_id = 42{}", " union select 1".repeat(1_900));
    let deep = format!("SELECT {}1{} FROM users WHERE user_id = 42", "(".repeat(190), ")".repeat(190));
    for sql in [chained, ors, ands, casts, isnull, nots, unions, deep] {
        match bind(&fixture, &sql, &[]) {
            Ok(plan) => assert_eq!(plan.target, Target::One(fixture.topology.shard_of(&Key::Int(42)))),
            Err(error) => assert_eq!(error.sqlstate, "0A000"),
        }
    }
}

#[test]
fn edits_keep_comments_and_literals_of_the_execution() {
    let fixture = Fixture::storefront(4);
    let (compiled, _) = fixture.compile("SELECT avg(total_cents) FROM orders WHERE status = 'a' LIMIT 5");
    let rewrite = compiled.template.rewrite().expect("merged");
    let other = "/* x */ SELECT avg( total_cents /* y */ ) -- z\n FROM orders WHERE status = 'it''s' LIMIT 7";
    let mut tokens = Vec::new();
    lex(other, &mut tokens).expect("lexes");
    assert_eq!(
        rewrite.apply(other, &tokens),
        "/* x */ SELECT avg( total_cents /* y */ ), sum( total_cents /* y */ ) AS weir_hidden_1, count( total_cents /* y */ ) \
         AS weir_hidden_2 -- z\n FROM orders WHERE status = 'it''s' "
    );
    assert_eq!(compiled.template.hidden_columns(), 2);
    assert_eq!(compiled.template.merged_columns(), Some(3));
}

/// A varchar(n) may store a key without its last blanks, and then on another slot than its text has.
#[test]
fn keys_that_a_varchar_would_cut_are_refused_when_inserted() {
    const VARCHAR: u32 = 1043;
    let mut fixture = Fixture::storefront(4);
    let answers = |fixture: &Fixture, sql: &str| {
        let (compiled, normal) = fixture.compile(sql);
        let values = Values { params: &[], sql, literals: &normal.literals };
        compiled.template.bind(&values, &fixture.topology).is_ok()
    };
    let blank = "INSERT INTO user_emails (email, user_id) VALUES ('a@b ', 1)";
    assert!(answers(&fixture, blank), "text keeps its blanks");
    let public = fixture.catalog.relations.get_mut("public").expect("there");
    let columns = &mut public.get_mut("user_emails").expect("there").columns;
    columns.iter_mut().find(|column| &*column.name == "email").expect("its key").type_oid = VARCHAR;
    assert!(!answers(&fixture, blank));
    assert!(!answers(&fixture, "INSERT INTO user_emails (email, user_id) VALUES ('a', 2), ('b ', 1)"));
    assert!(answers(&fixture, "INSERT INTO user_emails (email, user_id) VALUES ('a@b', 1)"));
    assert!(answers(&fixture, "SELECT user_id FROM user_emails WHERE email = 'a@b '"));
}
