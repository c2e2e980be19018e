//! What weir writes into statements that draw from sequences, and what it refuses.

mod plan_fixture;

use plan_fixture::Fixture;
use weir_core::plan::Drawing;
use weir_core::sql::lex::lex;
use weir_core::topology::catalog::{DrawnColumn, SequenceRule};

/// The storefront with a key from a sequence, an identity column beside another key, and a reference and a global table with serials.
fn fixture() -> Fixture {
    let mut fixture = Fixture::storefront(4);
    for (table, column, always) in [
        ("users", "user_id", false),
        ("order_items", "price_cents", true),
        ("order_items", "qty", false),
        ("brands", "brand_id", false),
        ("settings", "value", false),
    ] {
        let sequence = ("public".into(), format!("{table}_{column}_seq").into());
        fixture.catalog.sequences.insert(sequence.clone(), SequenceRule { start: 1, increment: 1, max: i64::MAX });
        let drawn = DrawnColumn { column: column.into(), sequence, always };
        fixture.catalog.drawn.entry(("public".into(), table.into())).or_default().push(drawn);
    }
    fixture
}

/// The filled text, with numbers from 1 and what each is; or the refusal.
fn filled(sql: &str) -> String {
    filled_by(&fixture(), sql)
}

fn filled_by(fixture: &Fixture, sql: &str) -> String {
    let (compiled, normal) = fixture.compile(sql);
    let Some(filling) = compiled.template.filling() else {
        let values = weir_core::plan::Values { params: &[], sql, literals: &normal.literals };
        return match compiled.template.bind(&values, &fixture.topology) {
            Err(error) => format!("refused: {}", error.message),
            Ok(_) => "as it is".to_owned(),
        };
    };
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).expect("lexes");
    filling.apply(sql, &tokens, |number| {
        let kind = match &filling.drawings[number] {
            Drawing::Next(sequence) => sequence.name.1.chars().next().unwrap_or(' '),
            Drawing::Current(_) => 'C',
            Drawing::Last => 'L',
            Drawing::Set { .. } => 'S',
            Drawing::Seen(_) => 'N',
        };
        format!("{kind}{number}")
    })
}

#[test]
fn a_shard_that_is_about_to_have_company_counts_itself() {
    let mut lone = fixture();
    lone.topology.slots = weir_core::topology::SlotMap::single(weir_core::id::ShardId(0));
    let lone = lone.and_one_joins();
    for sql in [
        "INSERT INTO users (name) VALUES ('a')",
        "SELECT nextval('users_user_id_seq')",
        "INSERT INTO brands (name) VALUES ('a')",
    ] {
        assert_eq!(filled_by(&lone, sql), "as it is", "{sql}");
    }
}

#[test]
fn defaults_of_sequences_are_written_out() {
    for (sql, expected) in [
        (
            "INSERT INTO users (name) VALUES ('a'), ('b');",
            "INSERT INTO users (name, \"user_id\") VALUES ('a', u0), ('b', u1);",
        ),
        ("INSERT INTO users VALUES (DEFAULT, 'a'), (5, 'b')", "INSERT INTO users VALUES (u0, 'a'), (5, 'b')"),
        ("INSERT INTO users DEFAULT VALUES RETURNING *", "INSERT INTO users (\"user_id\") VALUES (u0) RETURNING *"),
        (
            "insert into public.order_items as i values (1, $1) /* c */ returning qty",
            "insert into public.order_items as i (\"user_id\", \"order_id\", \"price_cents\", \"qty\") OVERRIDING SYSTEM VALUE values (1, $1, o0, o1) \
             /* c */ returning qty",
        ),
        (
            "INSERT INTO order_items (user_id, qty) OVERRIDING SYSTEM VALUE VALUES (1, DEFAULT), (2, 3)",
            "INSERT INTO order_items (user_id, qty, \"price_cents\") OVERRIDING SYSTEM VALUE VALUES (1, o0, o1), (2, 3, o2)",
        ),
        (
            "INSERT INTO brands (name, created_at) VALUES ('a', $1)",
            "INSERT INTO brands (name, created_at, \"brand_id\") VALUES ('a', $1, b0)",
        ),
        (
            "INSERT INTO users (user_id) VALUES (nextval('users_user_id_seq')), (DEFAULT)",
            "INSERT INTO users (user_id) VALUES (u0), (u1)",
        ),
    ] {
        assert_eq!(filled(sql), expected, "{sql}");
    }
}

#[test]
fn calls_are_answered_where_they_stand_alone() {
    for (sql, expected) in [
        ("SELECT nextval('users_user_id_seq')", "SELECT u0 AS nextval"),
        ("select currval('public.users_user_id_seq'::regclass)::int, 1 as x;", "select C0::int AS currval, 1 as x;"),
        ("SELECT lastval() AS id, setval('users_user_id_seq', 7, false)", "SELECT L0 AS id, S1 AS setval"),
        (
            "UPDATE users SET name = 'x' WHERE user_id = pg_catalog.lastval()",
            "UPDATE users SET name = 'x' WHERE user_id = L0",
        ),
        ("SELECT currval(pg_get_serial_sequence('users', 'user_id'))", "SELECT C0 AS currval"),
    ] {
        assert_eq!(filled(sql), expected, "{sql}");
    }
}

/// As pg_dump asks, and nothing beyond that.
#[test]
fn a_sequence_is_read_like_a_table() {
    assert_eq!(
        filled("SELECT last_value, is_called FROM public.users_user_id_seq"),
        "SELECT last_value, is_called FROM (SELECT CASE WHEN s.next > 1 THEN s.next - 1 ELSE 1 END AS last_value, \
         0::bigint AS log_cnt, s.next > 1 AS is_called FROM (SELECT N0 AS next) AS s) AS \"users_user_id_seq\""
    );
    for sql in ["SELECT last_value FROM settings_value_seq", "SELECT last_value FROM users_user_id_seq WHERE is_called"]
    {
        assert_eq!(filled(sql), "as it is", "{sql}");
    }
}

#[test]
fn what_is_not_weirs_stays_and_the_rest_is_refused() {
    for sql in [
        "INSERT INTO users (user_id) VALUES (1)",
        "INSERT INTO settings (name) VALUES ('a')",
        "SELECT nextval('settings_value_seq')",
        "SELECT nextval('unknown')",
        "SELECT 1",
        // Postgres refuses a value for a column that is GENERATED ALWAYS.
        "INSERT INTO order_items (user_id, qty, price_cents) VALUES (1, 1, 5)",
    ] {
        assert_eq!(filled(sql), "as it is", "{sql}");
    }
    let elsewhere = "refused: a sequence of sharded or reference tables cannot be used in this way";
    let left = "refused: the default of this column counts on each shard for itself";
    for (sql, expected) in [
        ("SELECT nextval('users_user_id_seq') + 1", elsewhere),
        ("SELECT nextval('users_user_id_seq') FROM products", elsewhere),
        ("SELECT nextval('users_user_id_seq'), unnest(ARRAY[1, 2])", elsewhere),
        ("SELECT (SELECT nextval('users_user_id_seq'))", elsewhere),
        ("SELECT coalesce(lastval(), 1)", elsewhere),
        ("SELECT setval('users_user_id_seq', 1 + 1)", elsewhere),
        ("INSERT INTO users (user_id, name) VALUES (1, (SELECT nextval('users_user_id_seq')))", elsewhere),
        ("SELECT nextval('users' || '_seq')", "refused: weir cannot tell which sequence is meant"),
        (
            "INSERT INTO users (name) VALUES (currval('users_user_id_seq'))",
            "refused: a statement cannot draw from a sequence and ask what was drawn",
        ),
        ("INSERT INTO order_items (user_id) SELECT 1", left),
        ("UPDATE order_items SET qty = DEFAULT WHERE user_id = 1", left),
        (
            "INSERT INTO order_items (user_id) OVERRIDING USER VALUE VALUES (1)",
            "refused: OVERRIDING USER VALUE is not supported on several shards",
        ),
        (
            "ALTER SEQUENCE users_user_id_seq RESTART",
            "refused: a sequence of sharded or reference tables cannot be started anew",
        ),
        (
            "TRUNCATE users RESTART IDENTITY",
            "refused: a sequence of sharded or reference tables cannot be started anew",
        ),
    ] {
        assert_eq!(filled(sql), expected, "{sql}");
    }
}
