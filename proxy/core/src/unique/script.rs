//! The objects in schema `weir` of every shard, and the triggers of a declared table, as SQL.
//!
//! Everything may be run again at any time. Functions run with the rights of weir's own account and a search_path that no client
//! controls; clients have no right on the tables, and the functions that weir calls over a client's connection want a secret
//! that only weir's account can read, sent as a parameter, so that no view of running statements shows it.
//!
//! The setting `weir.unsettled` is 'yes' between a note and its settlement. It follows savepoints as rows do. Who tampers with it
//! only loses the guard against his own forgetfulness: the notes themselves are settled by weir all the same.

use std::fmt::Write as _;

use super::Rule;
use crate::sql::word::{quote_literal, quote_name};

/// Longest wait for a value that another transaction is taking or giving up: longer than recovery needs to end a transaction
/// whose proxy was lost. Sessions that wait for each other on different servers, where neither server sees the circle, end so.
pub const WAIT_S: u32 = 8;

/// What [`settle`](script) returns: slot, rule, value, key, delta.
pub const SETTLE: &str = "SELECT * FROM weir.unique_settle($1, $2)";
/// Tells a shard of notes: rules, values, keys, deltas, as arrays.
pub const APPLY: &str = "SELECT weir.unique_apply($1, $2, $3, $4, $5)";

/// Nothing that is there already may be locked: a transaction that is prepared has written the notes' table, and waits for a decision that
/// only a weir which has started can bring. CREATE INDEX IF NOT EXISTS takes its lock before it looks.
const TABLES: &str = "
CREATE TABLE IF NOT EXISTS weir.unique_secret (secret text NOT NULL);
INSERT INTO weir.unique_secret SELECT gen_random_uuid()::text WHERE NOT EXISTS (SELECT FROM weir.unique_secret);
CREATE TABLE IF NOT EXISTS weir.unique_rule (
    rule bigint PRIMARY KEY, schema_name text NOT NULL, table_name text NOT NULL, column_name text NOT NULL,
    constraint_name text NOT NULL, state text NOT NULL, reason text, changed timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS weir.unique_value (
    rule bigint, value text COLLATE \"C\", key text COLLATE \"C\" NOT NULL, PRIMARY KEY (rule, value));
CREATE UNLOGGED TABLE IF NOT EXISTS weir.unique_pending (
    xact xid8 NOT NULL DEFAULT pg_current_xact_id(), rule bigint NOT NULL, value text COLLATE \"C\",
    key text COLLATE \"C\", delta int NOT NULL, first boolean NOT NULL);
DO $weir$ BEGIN
    IF to_regclass('weir.unique_pending_xact') IS NULL THEN CREATE INDEX unique_pending_xact ON weir.unique_pending (xact); END IF;
END $weir$;";

/// Notes exist only within the transaction that makes them, so the guard has to look once per round of notes: at the first.
const GUARD: &str = "
CREATE OR REPLACE FUNCTION weir.unique_guard() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $weir$
BEGIN
    IF current_setting('weir.unsettled', true) = 'yes' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'values of globally unique columns have not been checked on all shards',
            DETAIL = 'They were written past weir, or by code that weir cannot see through.',
            HINT = 'Write the table through weir with statements of its own; a function that does it needs BEGIN and COMMIT around it.';
    END IF;
    RETURN NULL;
END $weir$;
DO $weir$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'weir.unique_pending'::regclass AND tgname = 'unique_guard') THEN
        CREATE CONSTRAINT TRIGGER unique_guard AFTER INSERT ON weir.unique_pending DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.first) EXECUTE FUNCTION weir.unique_guard();
    END IF;
END $weir$;";

/// A value that is given up but not there yet belongs to a transaction that has committed on the row's shard and is about to
/// here: inserting it waits for that. ON CONFLICT DO NOTHING waits likewise for whoever is taking or giving up a value.
const PUT: &str = "
CREATE OR REPLACE FUNCTION weir.unique_put(a_rule bigint, a_value text, a_key text, a_delta int) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $weir$
DECLARE known record;
BEGIN
    IF a_delta < 0 THEN
        DELETE FROM weir.unique_value v WHERE v.rule = a_rule AND v.value = a_value AND v.key = a_key;
        IF NOT FOUND THEN
            INSERT INTO weir.unique_value VALUES (a_rule, a_value, a_key) ON CONFLICT DO NOTHING;
            DELETE FROM weir.unique_value v WHERE v.rule = a_rule AND v.value = a_value AND v.key = a_key;
        END IF;
        RETURN;
    END IF;
    INSERT INTO weir.unique_value VALUES (a_rule, a_value, a_key) ON CONFLICT DO NOTHING;
    IF FOUND AND a_delta = 1 THEN
        RETURN;
    END IF;
    SELECT * INTO known FROM weir.unique_rule r WHERE r.rule = a_rule;
    RAISE EXCEPTION USING ERRCODE = '23505',
        MESSAGE = format('duplicate key value violates unique constraint \"%s\"', known.constraint_name),
        DETAIL = format('Key (%s)=(%s) already exists.', known.column_name, a_value),
        SCHEMA = known.schema_name, TABLE = known.table_name, CONSTRAINT = known.constraint_name;
END $weir$;
CREATE OR REPLACE FUNCTION weir.unique_check(a_secret text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $weir$
BEGIN
    IF NOT EXISTS (SELECT FROM weir.unique_secret s WHERE s.secret = a_secret) THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'permission denied: only weir settles globally unique values';
    END IF;
END $weir$;
REVOKE ALL ON FUNCTION weir.unique_put(bigint, text, text, int), weir.unique_check(text), weir.unique_guard() FROM PUBLIC;";

/// Ends a round of notes. What belongs to slots of `a_owned` is put here at once; the rest is returned. One value's notes add up,
/// so that their order does not matter; sorted, so that transactions meet in the same order.
const SETTLING: &str = "
CREATE OR REPLACE FUNCTION weir.unique_settle(a_secret text, a_owned bytea)
    RETURNS TABLE (slot int, rule bigint, value text, key text, delta int) LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '{wait}s' AS $weir$
#variable_conflict use_column
DECLARE one record;
BEGIN
    PERFORM weir.unique_check(a_secret);
    PERFORM set_config('weir.unsettled', '', true);
    FOR one IN
        WITH taken AS (DELETE FROM weir.unique_pending p WHERE p.xact = pg_current_xact_id() RETURNING p.*)
        SELECT t.rule, t.value, t.key, sum(t.delta)::int AS delta,
               ((hashtextextended(t.value, 0) >> 52) & 4095)::int AS slot
        FROM taken t GROUP BY t.rule, t.value, t.key HAVING sum(t.delta) <> 0 OR t.value IS NULL
        ORDER BY t.rule, t.value, sum(t.delta)
    LOOP
        IF one.value IS NOT NULL AND get_bit(a_owned, one.slot) = 1 THEN
            PERFORM weir.unique_put(one.rule, one.value, one.key, one.delta);
        ELSE
            slot := one.slot; rule := one.rule; value := one.value; key := one.key; delta := one.delta;
            RETURN NEXT;
        END IF;
    END LOOP;
END $weir$;
CREATE OR REPLACE FUNCTION weir.unique_apply(a_secret text, a_rules bigint[], a_values text[], a_keys text[], a_deltas int[])
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '{wait}s' AS $weir$
DECLARE one record;
BEGIN
    PERFORM weir.unique_check(a_secret);
    FOR one IN SELECT * FROM unnest(a_rules, a_values, a_keys, a_deltas) AS u(rule, value, key, delta)
               ORDER BY u.rule, u.value COLLATE \"C\" NULLS FIRST, u.delta
    LOOP
        IF one.value IS NOT NULL THEN
            PERFORM weir.unique_put(one.rule, one.value, one.key, one.delta);
        ELSIF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'TRUNCATE of a table with globally unique columns needs READ COMMITTED';
        ELSE
            LOCK TABLE weir.unique_value IN SHARE ROW EXCLUSIVE MODE;
            DELETE FROM weir.unique_value v WHERE v.rule = one.rule;
        END IF;
    END LOOP;
END $weir$;
GRANT EXECUTE ON FUNCTION weir.unique_settle(text, bytea), weir.unique_apply(text, bigint[], text[], text[], int[]) TO PUBLIC;";

/// The tables and functions that all rules share. Schema `weir` must be there.
pub fn shared() -> String {
    let settling = SETTLING.replace("{wait}", &WAIT_S.to_string());
    format!("{TABLES}{GUARD}{PUT}{settling}")
}

/// The triggers of one rule. The table must be there, with its columns; waits for whoever is writing it. The UPDATE trigger's
/// condition makes Postgres refuse to drop or retype the columns without CASCADE; a renamed one fails in the function.
pub fn triggers(rule: &Rule) -> String {
    let table = table_name(rule);
    let function = format!("weir.{}", quote_name(&rule.object("note")));
    let (column, key, id) = (quote_name(&rule.column), quote_name(&rule.key), rule.id().0);
    let note = |row: &str, delta: i32| {
        format!(
            "IF {row}.{column} IS NOT NULL THEN
            INSERT INTO weir.unique_pending (rule, value, key, delta, first)
            VALUES ({id}, {row}.{column}::text, {row}.{key}::text, {delta}, starts);
            starts := false; noted := true;
        END IF;"
        )
    };
    let mut sql = format!(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $weir$
DECLARE
    starts boolean := current_setting('weir.unsettled', true) IS DISTINCT FROM 'yes';
    noted boolean := false;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO weir.unique_pending (rule, delta, first) VALUES ({id}, 0, starts);
        noted := true;
    END IF;
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        {given_up}
    END IF;
    IF TG_OP IN ('UPDATE', 'INSERT') THEN
        {taken}
    END IF;
    IF noted THEN
        PERFORM set_config('weir.unsettled', 'yes', true);
    END IF;
    RETURN NULL;
END $weir$;
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC;
",
        given_up = note("OLD", -1),
        taken = note("NEW", 1),
    );
    sql.push_str(&drop_triggers(rule));
    let changed = format!(" WHEN (OLD.{column} IS DISTINCT FROM NEW.{column} OR OLD.{key} IS DISTINCT FROM NEW.{key})");
    for (event, per, condition) in [
        ("insert", "ROW", ""),
        ("update", "ROW", changed.as_str()),
        ("delete", "ROW", ""),
        ("truncate", "STATEMENT", ""),
    ] {
        let (name, event) = (quote_name(&rule.object(event)), event.to_uppercase());
        // Writing to a String cannot fail.
        let _ = writeln!(
            sql,
            "CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH {per}{condition} EXECUTE FUNCTION {function}();"
        );
    }
    sql
}

/// Takes the triggers of a rule away, where the table is there.
pub fn drop_triggers(rule: &Rule) -> String {
    let table = table_name(rule);
    TRIGGERS.iter().fold(String::new(), |sql, what| {
        sql + &format!("DROP TRIGGER IF EXISTS {} ON {table};\n", quote_name(&rule.object(what)))
    })
}

/// The triggers that a rule has.
pub const TRIGGERS: [&str; 4] = ["insert", "update", "delete", "truncate"];

/// Keeps a rule's state, on one shard.
pub fn state(rule: &Rule, state: &str, reason: Option<&str>) -> String {
    let text = |value: &str| quote_literal(value);
    format!(
        "INSERT INTO weir.unique_rule (rule, schema_name, table_name, column_name, constraint_name, state, reason)
VALUES ({}, {}, {}, {}, {}, {}, {reason})
ON CONFLICT (rule) DO UPDATE SET state = excluded.state, reason = excluded.reason, changed = now();",
        rule.id().0,
        text(&rule.schema),
        text(&rule.table),
        text(&rule.column),
        text(&rule.constraint()),
        text(state),
        reason = reason.map_or_else(|| "NULL".to_owned(), quote_literal),
    )
}

pub fn table_name(rule: &Rule) -> String {
    format!("{}.{}", quote_name(&rule.schema), quote_name(&rule.table))
}
