//! Where guests are left out of the texts that shards are sent.

mod plan_fixture;

use std::path::Path;

use plan_fixture::Fixture;
use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::plan::{Datum, Plan, Schema, Values, WithoutGuests};
use weir_core::sql::lex::lex;
use weir_core::sql::normal::Normal;
use weir_core::sql::parse::facts;
use weir_core::topology::KeySet;
use weir_core::topology::moves::{Move, Moves, Stage};

/// Shard 2 of four has guests.
fn fixture() -> Fixture {
    let mut fixture = Fixture::storefront(4);
    let keys = KeySet::parse("3-5").expect("a set");
    let one = Move { id: 1, from: ShardId(0), to: ShardId(1), keys, stage: Stage::Copying };
    fixture.topology.moves = Moves::new(vec![one]);
    fixture
}

fn schema(fixture: &Fixture) -> Schema<'_> {
    Schema {
        rules: &fixture.topology.tables,
        catalog: &fixture.catalog,
        search_path: &fixture.search_path,
        width: fixture.topology.width(),
    }
}

/// The text for the shard that has guests, with what tells them by their key shortened. `None`: the statement cannot meet any.
fn filtered(fixture: &Fixture, sql: &str) -> Result<Option<String>, UserError> {
    let (compiled, normal) = fixture.compile(sql);
    let params: Vec<Datum<'_>> = (0..normal.params).map(|_| Datum::Text(b"{1,2,3,4,5,6,7,8,9}")).collect();
    let plan =
        compiled.template.bind(&Values { params: &params, sql, literals: &normal.literals }, &fixture.topology)?;
    let Some(guests) = &plan.guests else { return Ok(None) };
    let found = compiled.template.without_guests(&normal, &schema(fixture))?;
    let merged = compiled.template.rewrite().filter(|_| plan.merge.is_some());
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).expect("lexes");
    Ok(Some(shortened(&found.text((sql, &tokens), merged, &guests[&ShardId(1)]))))
}

fn shortened(text: &str) -> String {
    let bits = text.split('\'').find(|part| part.len() == 1024).unwrap_or("nothing");
    let head = format!("pg_catalog.get_bit(pg_catalog.decode('{bits}', 'hex'), pg_catalog.int8and(pg_catalog.int8shr(");
    text.replace(&head, "<")
        .replace(", 0), 52), 4095)::pg_catalog.int4) OPERATOR(pg_catalog.<>) 1", ">")
        .replace("pg_catalog.hashint8extended(", "")
        .replace("pg_catalog.hashtextextended(", "")
        .replace("pg_catalog.uuid_hash_extended(", "")
}

#[test]
fn guests_are_left_out_where_rows_are_chosen() {
    let fixture = fixture();
    let u = r#"<"users"."user_id">"#;
    let o = r#"<"o"."user_id">"#;
    for (sql, expected) in [
        ("SELECT name FROM users", format!("SELECT name FROM users WHERE {u}")),
        ("SELECT name FROM users; -- end", format!("SELECT name FROM users WHERE {u}; -- end")),
        (
            "SELECT status FROM public.orders AS o WHERE status = 'x' AND total_cents > 1 LIMIT 3",
            format!("SELECT status FROM public.orders AS o WHERE status = 'x' AND total_cents > 1 AND {o} LIMIT 3"),
        ),
        (
            "SELECT status FROM orders o WHERE status = 'x' OR total_cents > 1",
            format!("SELECT status FROM orders o WHERE( status = 'x' OR total_cents > 1) AND {o}"),
        ),
        (
            "SELECT user_id AS where, o.status AS \"or\" FROM orders o WHERE o.status = ANY(ARRAY['a', 'b']) /* c */ GROUP BY 1, 2",
            format!(
                "SELECT user_id AS where, o.status AS \"or\" FROM orders o WHERE o.status = ANY(ARRAY['a', 'b']) AND {o} /* c */ \
                 GROUP BY 1, 2"
            ),
        ),
        (
            "SELECT count(*) FILTER (WHERE qty > 1) FROM cart_items",
            "SELECT count(*) FILTER (WHERE qty > 1) FROM cart_items WHERE <\"cart_items\".\"user_id\">".to_owned(),
        ),
        // The others' rows matter with equal keys only.
        (
            "SELECT o.status, i.name FROM orders o LEFT JOIN order_items i USING (user_id) WHERE i.qty IS NULL",
            format!(
                "SELECT o.status, i.name FROM orders o LEFT JOIN order_items i USING (user_id) WHERE i.qty IS NULL AND {o}"
            ),
        ),
        (
            "SELECT o.status FROM order_items i RIGHT JOIN orders o ON i.user_id = o.user_id",
            format!("SELECT o.status FROM order_items i RIGHT JOIN orders o ON i.user_id = o.user_id WHERE {o}"),
        ),
        (
            "SELECT name FROM users WHERE EXISTS (SELECT FROM orders o WHERE o.user_id = users.user_id AND o.status = 'x')",
            format!(
                "SELECT name FROM users WHERE EXISTS (SELECT FROM orders o WHERE o.user_id = users.user_id AND o.status = 'x') AND {u}"
            ),
        ),
        (
            "SELECT x.status FROM (SELECT status, total_cents FROM orders o) x WHERE x.total_cents > 1",
            format!(
                "SELECT x.status FROM (SELECT status, total_cents FROM orders o WHERE {o}) x WHERE x.total_cents > 1"
            ),
        ),
        (
            "SELECT status FROM orders o WHERE user_id = ANY($1)",
            format!("SELECT status FROM orders o WHERE user_id = ANY($1) AND {o}"),
        ),
        (
            "WITH p AS (SELECT product_id FROM products WHERE active) SELECT * FROM cart_items c WHERE product_id IN (SELECT product_id FROM p)",
            "WITH p AS (SELECT product_id FROM products WHERE active) SELECT * FROM cart_items c WHERE product_id IN \
             (SELECT product_id FROM p) AND <\"c\".\"user_id\">"
                .to_owned(),
        ),
        (
            "SELECT \"größe\".label FROM devices \"größe\"",
            "SELECT \"größe\".label FROM devices \"größe\" WHERE <\"größe\".\"device_id\">".to_owned(),
        ),
        (
            "SELECT email\n  FROM user_emails -- ü\n WHERE claimed_at IS NULL\n",
            "SELECT email\n  FROM user_emails -- ü\n WHERE claimed_at IS NULL AND <\"user_emails\".\"email\">\n"
                .to_owned(),
        ),
        // With what merging needs.
        (
            "SELECT name FROM users ORDER BY created_at LIMIT 2 OFFSET 1",
            format!(
                "SELECT name, created_at AS weir_hidden_1 FROM users WHERE {u} ORDER BY created_at \
                 LIMIT (least(2::int8::numeric + 1::int8, 9223372036854775807)::int8) "
            ),
        ),
        (
            "SELECT avg(total_cents) FROM orders o ORDER BY 1",
            format!(
                "SELECT avg(total_cents), sum(total_cents) AS weir_hidden_1, count(total_cents) AS weir_hidden_2 FROM orders o WHERE {o} "
            ),
        ),
        // Writes.
        ("DELETE FROM orders o", format!("DELETE FROM orders o WHERE {o}")),
        ("DELETE FROM orders o RETURNING *", format!("DELETE FROM orders o WHERE {o} RETURNING *")),
        (
            "DELETE FROM orders o USING users WHERE users.user_id = o.user_id AND (users.name = 'a' OR o.status = 'b')",
            format!(
                "DELETE FROM orders o USING users WHERE users.user_id = o.user_id AND (users.name = 'a' OR o.status = 'b') AND {o}"
            ),
        ),
        (
            "UPDATE orders AS o SET status = 'x', total_cents = 1 WHERE total_cents > 5 OR status = 'y' RETURNING user_id",
            format!(
                "UPDATE orders AS o SET status = 'x', total_cents = 1 WHERE( total_cents > 5 OR status = 'y') AND {o} RETURNING user_id"
            ),
        ),
        (
            "INSERT INTO cart_items (user_id, product_id) SELECT user_id, 1 FROM orders o WHERE status = 'x' ON CONFLICT DO NOTHING",
            format!(
                "INSERT INTO cart_items (user_id, product_id) SELECT user_id, 1 FROM orders o WHERE status = 'x' AND {o} ON CONFLICT DO NOTHING"
            ),
        ),
        (
            "WITH gone AS (DELETE FROM orders o WHERE status = 'x' RETURNING *) UPDATE users SET name = 'y' FROM gone WHERE gone.user_id = users.user_id",
            format!(
                "WITH gone AS (DELETE FROM orders o WHERE status = 'x' AND {o} RETURNING *) \
                 UPDATE users SET name = 'y' FROM gone WHERE gone.user_id = users.user_id AND {u}"
            ),
        ),
        (
            "MERGE INTO cart_items AS c USING orders o ON c.user_id = o.user_id AND (o.status = 'x' OR true) WHEN MATCHED THEN DELETE",
            "MERGE INTO cart_items AS c USING (SELECT * FROM orders WHERE <\"user_id\">) o ON c.user_id = o.user_id \
             AND (o.status = 'x' OR true) AND <\"c\".\"user_id\"> WHEN MATCHED THEN DELETE"
                .to_owned(),
        ),
        (
            "MERGE INTO cart_items USING public.users ON users.user_id = cart_items.user_id WHEN NOT MATCHED THEN \
             INSERT (user_id, product_id) VALUES (users.user_id, 1)",
            "MERGE INTO cart_items USING (SELECT * FROM public.users WHERE <\"user_id\">) AS users \
             ON users.user_id = cart_items.user_id AND <\"cart_items\".\"user_id\"> WHEN NOT MATCHED THEN \
             INSERT (user_id, product_id) VALUES (users.user_id, 1)"
                .to_owned(),
        ),
        (
            "MERGE INTO cart_items c USING (SELECT user_id FROM users WHERE name = 'x') s ON s.user_id = c.user_id WHEN MATCHED THEN DELETE",
            format!(
                "MERGE INTO cart_items c USING (SELECT user_id FROM users WHERE name = 'x' AND {u}) s ON s.user_id = c.user_id \
                 AND <\"c\".\"user_id\"> WHEN MATCHED THEN DELETE"
            ),
        ),
        (
            "MERGE INTO cart_items c USING products p ON p.product_id = c.product_id OR c.qty = 1 WHEN MATCHED THEN UPDATE SET qty = 2",
            "MERGE INTO cart_items c USING products p ON( p.product_id = c.product_id OR c.qty = 1) AND <\"c\".\"user_id\"> \
             WHEN MATCHED THEN UPDATE SET qty = 2"
                .to_owned(),
        ),
        // Around a query or a table.
        ("EXPLAIN (COSTS off) SELECT name FROM users", format!("EXPLAIN (COSTS off) SELECT name FROM users WHERE {u}")),
        (
            "DECLARE c CURSOR FOR SELECT name FROM users",
            format!("DECLARE c CURSOR FOR SELECT name FROM users WHERE {u}"),
        ),
        (
            "COPY (SELECT name FROM users WHERE name > 'a') TO STDOUT (FORMAT csv)",
            format!("COPY (SELECT name FROM users WHERE name > 'a' AND {u}) TO STDOUT (FORMAT csv)"),
        ),
        (
            "COPY public.cart_items (qty, \"user_id\") TO STDOUT WITH CSV HEADER",
            "COPY (SELECT qty, \"user_id\" FROM public.cart_items WHERE <\"user_id\">) TO STDOUT WITH CSV HEADER"
                .to_owned(),
        ),
        (
            "COPY cart_items TO STDOUT;",
            "COPY (SELECT \"user_id\", \"product_id\", \"qty\" FROM cart_items WHERE <\"user_id\">) TO STDOUT;"
                .to_owned(),
        ),
    ] {
        match filtered(&fixture, sql) {
            Ok(Some(text)) => assert_eq!(text, expected, "{sql}"),
            Ok(None) => panic!("cannot meet guests: {sql}"),
            Err(error) => panic!("{sql}: {error:?}"),
        }
    }
}

#[test]
fn what_meets_no_guests_stays_as_it_is() {
    let fixture = fixture();
    for sql in [
        "SELECT name FROM users WHERE user_id = 1",
        "SELECT name FROM products",
        "UPDATE products SET name = 'x'",
        "INSERT INTO users (user_id) VALUES (1), (2), (3), (4), (5), (6)",
        "COPY cart_items FROM STDIN",
        "SELECT 1",
        "UPDATE settings SET value = 'x'",
    ] {
        assert_eq!(filtered(&fixture, sql).expect(sql), None, "{sql}");
    }
    for sql in ["CREATE INDEX ON users (name)", "LOCK TABLE users", "ALTER TABLE users ADD COLUMN x int"] {
        let (compiled, normal) = fixture.compile(sql);
        assert_eq!(compiled.template.without_guests(&normal, &schema(&fixture)), Ok(WithoutGuests::default()), "{sql}");
    }
    // Where nothing moves, no plan has guests.
    let still = Fixture::storefront(4);
    assert_eq!(filtered(&still, "SELECT name FROM users").expect("a plan"), None);
}

#[test]
fn what_cannot_leave_guests_out_is_refused() {
    let fixture = fixture();
    for (sql, sqlstate) in [
        ("TRUNCATE users", "55006"),
        ("REFRESH MATERIALIZED VIEW totals", "55006"),
        ("CREATE MATERIALIZED VIEW totals AS SELECT 1", "55006"),
        // The engine may answer it.
        ("SELECT a FROM users AS u (a, b, c)", "0A000"),
        ("COPY fresh_table TO STDOUT", "0A000"),
    ] {
        match filtered(&fixture, sql) {
            Err(error) => {
                assert_eq!(error.sqlstate, sqlstate, "{sql}: {error:?}");
                assert!(error.hint.is_some_and(|hint| hint.contains("SHOW MOVES")), "{sql}");
            }
            other => panic!("{sql}: {other:?}"),
        }
    }
}

/// Every statement of the golden files that several shards answer: with guests left out it says the same of the same tables.
#[test]
#[allow(clippy::disallowed_methods)] // a test reads its own data
fn a_filtered_statement_means_the_same() {
    let fixture = fixture();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/plan");
    let mut seen = 0;
    for file in std::fs::read_dir(golden).expect("golden directory") {
        let text = std::fs::read_to_string(file.expect("entry").path()).expect("golden file");
        for block in text.split("\n\n") {
            let lines = block.lines().take_while(|line| *line != "---");
            let lines = lines.filter(|line| !line.starts_with('#') && !line.starts_with("params:"));
            let sql = lines.collect::<Vec<_>>().join("\n");
            if !sql.trim().is_empty() {
                seen += usize::from(compared(&fixture, &sql));
            }
        }
    }
    assert!(seen > 100, "only {seen} statements were compared");
}

/// False: it meets no guests.
fn compared(fixture: &Fixture, sql: &str) -> bool {
    let (compiled, normal) = fixture.compile(sql);
    let params: Vec<Datum<'_>> = (0..normal.params).map(|_| Datum::Text(b"{1,2,3,4,5,6,7,8,9}")).collect();
    let values = Values { params: &params, sql, literals: &normal.literals };
    let Ok(Plan { guests: Some(guests), .. }) = compiled.template.bind(&values, &fixture.topology) else {
        return false;
    };
    let learn = |text: &str| {
        let mut tokens = Vec::new();
        lex(text, &mut tokens).expect("lexes");
        let mut facts = facts(text, &tokens, normal.params, &schema(fixture)).ok()?;
        facts.functions.retain(|function| function.schema.as_deref() != Some("pg_catalog"));
        Some(facts)
    };
    let Some(before) = learn(&normal.text) else { return false };
    let found = match compiled.template.without_guests(&normal, &schema(fixture)) {
        Ok(found) => found,
        Err(error) => panic!("{sql}: {error:?}"),
    };
    assert!(!found.is_empty(), "{sql}");
    let mut tokens = Vec::new();
    let Normal { text, .. } = &normal;
    lex(text, &mut tokens).expect("lexes");
    let after = found.text((text, &tokens), None, &guests[&ShardId(1)]);
    assert_ne!(after, *text);
    let mut learnt = learn(&after).unwrap_or_else(|| panic!("not parsed: {}", shortened(&after)));
    // What is said of the parameters of the whole stays, too; only the functions are more.
    learnt.functions.clone_from(&before.functions);
    assert_eq!(learnt, before, "{}", shortened(&after));
    true
}
