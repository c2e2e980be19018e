//! What plans say of columns that are unique over all shards: what is settled, what is refused, and that nothing else is touched.

mod plan_fixture;

use std::sync::Arc;

use plan_fixture::Fixture;
use weir_core::error::UserError;
use weir_core::plan::{Noting, Plan, Values};
use weir_core::topology::catalog::{UniqueColumn, UniqueState};

/// The storefront with `user_emails.user_id` and `orders.status` unique over all shards; only the first has got its triggers.
fn fixture(shards: u16, state: UniqueState) -> Fixture {
    let mut fixture = Fixture::storefront(shards);
    let mut rules = (*fixture.topology.tables).clone();
    rules.insert_unique("public", "user_emails", vec!["user_id".into()]);
    rules.insert_unique("public", "orders", vec!["status".into()]);
    fixture.topology.tables = Arc::new(rules);
    let column = UniqueColumn { column: "user_id".into(), state };
    fixture.catalog.unique.insert(("public".into(), "user_emails".into()), vec![column]);
    fixture
}

fn bind(fixture: &Fixture, sql: &str) -> Result<Plan, UserError> {
    let (compiled, normal) = fixture.compile(sql);
    let values = Values { params: &[], sql, literals: &normal.literals };
    compiled.template.bind(&values, &fixture.topology)
}

#[test]
fn writes_of_such_a_table_are_settled_and_nothing_else_is() {
    let fixture = fixture(2, UniqueState::Valid);
    let settled = Noting::Settled { skips: false };
    let skips = Noting::Settled { skips: true };
    for (sql, noting, settles) in [
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1)", settled, true),
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1), ('b', 2), ('c', 3)", settled, true),
        ("UPDATE user_emails SET user_id = 7 WHERE email = 'a'", settled, true),
        ("UPDATE user_emails SET user_id = 7", settled, true),
        ("DELETE FROM public.user_emails WHERE email = 'a'", settled, true),
        ("COPY user_emails FROM STDIN", settled, true),
        ("TRUNCATE user_emails", settled, true),
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1) ON CONFLICT DO NOTHING", skips, true),
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1) ON CONFLICT (user_id) DO NOTHING", skips, true),
        (
            "INSERT INTO user_emails (email, user_id) VALUES ('a', 1) ON CONFLICT ON CONSTRAINT u DO NOTHING",
            skips,
            true,
        ),
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1) ON CONFLICT (email) DO NOTHING", settled, true),
        // Its triggers and cascades may reach such a table.
        ("UPDATE users SET name = 'x' WHERE user_id = 1", settled, true),
        ("SELECT do_something()", Noting::Late, false),
        ("CALL do_something()", Noting::Late, false),
        ("SELECT * FROM user_emails WHERE email = 'a'", Noting::None, false),
        ("EXPLAIN DELETE FROM user_emails WHERE email = 'a'", Noting::None, false),
        ("COPY user_emails TO STDOUT", Noting::None, false),
        ("UPDATE cart_items SET qty = 1 WHERE user_id = 1", Noting::None, false),
        ("INSERT INTO settings VALUES ('a', 'b')", Noting::None, false),
    ] {
        let plan = bind(&fixture, sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert_eq!((plan.noting, plan.settles()), (noting, settles), "{sql}");
    }
}

#[test]
fn what_cannot_be_checked_is_refused() {
    let failed = |noted| UniqueState::Failed { reason: "Some values are there twice.".into(), noted };
    let insert = "INSERT INTO user_emails (email, user_id) VALUES ('a', 1)";
    let delete = "DELETE FROM user_emails WHERE email = 'a'";
    let refused = |fixture: &Fixture, sql: &str| bind(fixture, sql).err().map(|error| error.sqlstate);
    for (state, inserts, deletes) in [
        (UniqueState::Building, None, None),
        (failed(true), Some("55000"), None),
        (failed(false), Some("55000"), Some("55000")),
    ] {
        let fixture = fixture(2, state.clone());
        assert_eq!(refused(&fixture, insert), inserts, "{state:?}");
        assert_eq!(refused(&fixture, delete), deletes, "{state:?}");
        assert_eq!(refused(&fixture, "COPY user_emails FROM STDIN"), inserts, "{state:?}");
        // Its triggers are not there.
        assert_eq!(refused(&fixture, "UPDATE orders SET status = 'x' WHERE user_id = 1"), Some("55000"));
    }
    let single = fixture(1, failed(false));
    assert_eq!(bind(&single, insert).map(|plan| plan.noting), Ok(Noting::None));
}

#[test]
fn a_shard_that_is_about_to_have_company_refuses_nothing_and_settles_everything() {
    let mut lone = fixture(1, UniqueState::Building).and_one_joins();
    let settled = Noting::Settled { skips: false };
    let texts = [
        ("INSERT INTO user_emails (email, user_id) VALUES ('a', 1)", settled),
        // No key, which the server gives it.
        ("INSERT INTO user_emails (user_id) VALUES (1)", settled),
        ("COPY user_emails FROM STDIN", settled),
        ("MERGE INTO user_emails USING users ON false WHEN NOT MATCHED THEN INSERT VALUES (1, 2)", settled),
        ("WITH gone AS (DELETE FROM user_emails RETURNING *) SELECT count(*) FROM gone", settled),
        ("UPDATE orders SET status = 'x'", settled),
        ("SELECT do_something()", Noting::Late),
        ("UPDATE cart_items SET qty = 1", Noting::None),
        ("SELECT * FROM user_emails", Noting::None),
    ];
    // Before there are triggers, and after.
    for _ in 0..2 {
        for (sql, noting) in texts {
            let plan = bind(&lone, sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
            assert_eq!(plan.noting, noting, "{sql}");
        }
        lone.catalog.unique.clear();
    }
}
