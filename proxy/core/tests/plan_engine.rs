//! Which refused statements the fallback engine may answer: reads that are the same on every server, and nothing else.

mod plan_fixture;

use plan_fixture::Fixture;
use weir_core::plan::{Target, Values};

/// Statements over sharded tables that the planner refuses.
const ANSWERED: &[&str] = &[
    "SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders",
    "SELECT a.order_id FROM orders a JOIN orders b ON a.total_cents = b.total_cents",
    "SELECT user_id FROM users UNION SELECT user_id FROM orders",
    "SELECT DISTINCT ON (status) status FROM orders",
    "WITH x AS (SELECT user_id FROM orders LIMIT 3) SELECT now(), current_user, to_char(now(), 'YYYY') FROM x",
    "SELECT status, random() FROM orders ORDER BY lower(status) COLLATE \"de_DE\"",
    "TABLE orders",
    "EXPLAIN SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders",
    "SELECT user_id FROM orders ORDER BY total_cents LIMIT 3 + 1",
    "DECLARE c CURSOR FOR SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders",
    "COPY (SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders) TO STDOUT",
    "COPY (SELECT count(*) FROM orders) TO STDOUT (FORMAT csv, HEADER)",
    "COPY (TABLE orders ORDER BY order_id) TO STDOUT",
];

/// What changes something, is one server's, or is not known to be harmless.
const REFUSED: &[&str] = &[
    "SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders FOR UPDATE",
    "SELECT ctid, rank() OVER (ORDER BY total_cents) FROM orders",
    "SELECT tableoid::regclass, rank() OVER (ORDER BY total_cents) FROM orders",
    "SELECT 'orders'::regclass, rank() OVER (ORDER BY total_cents) FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents), current_database() FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents), pg_backend_pid() FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents), nextval('s') FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents), set_config('a.b', 'c', false) FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents), no_such_function() FROM orders",
    "SELECT rank() OVER (ORDER BY total_cents) FROM ONLY orders",
    "SELECT relname, rank() OVER (ORDER BY total_cents) FROM orders, pg_class",
    "SELECT rank() OVER (ORDER BY total_cents) INTO copy FROM orders",
    "WITH x AS (DELETE FROM orders RETURNING *) SELECT rank() OVER (ORDER BY total_cents) FROM x",
    "TABLE orders FOR SHARE",
    "UPDATE orders SET user_id = 3 WHERE user_id = 2",
    "INSERT INTO orders SELECT * FROM orders LIMIT 3",
    "COPY (SELECT ctid, rank() OVER (ORDER BY total_cents) FROM orders) TO STDOUT",
    "COPY (SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders) TO '/nowhere'",
    "COPY (SELECT order_id, rank() OVER (ORDER BY total_cents) FROM orders) TO PROGRAM 'cat'",
    "COPY (DELETE FROM orders RETURNING *) TO STDOUT",
];

fn on_engine(fixture: &Fixture, sql: &str) -> bool {
    let (compiled, normal) = fixture.compile(sql);
    let values = Values { params: &[], sql, literals: &normal.literals };
    let refusal = compiled.template.bind(&values, &fixture.topology).expect_err(sql);
    compiled.template.on_engine(refusal).is_ok_and(|plan| plan.target == Target::Engine)
}

#[test]
fn only_reads_that_are_the_same_everywhere_go_to_the_engine() {
    let fixture = Fixture::storefront(4);
    let wrong: Vec<&&str> = ANSWERED
        .iter()
        .filter(|sql| !on_engine(&fixture, sql))
        .chain(REFUSED.iter().filter(|sql| on_engine(&fixture, sql)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
