//! What a move keeps on its two servers, and what it asks of them, as SQL.
//!
//! Invariant: a row of a moving slot can be written on a server only while that server's fence is open, whoever writes it; who has
//! written one holds a lock until the end of its transaction, prepared ones included, so that closing the fence waits for exactly
//! those. Everything lies in schema `weir` or bears the move's number in its name, so that nothing of it can be overlooked. Superusers
//! who set `session_replication_role` go past it; the mover itself does.
//! Non-goals: running any of it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::lock::{COPIES, MAKE_SCHEMA, MOVE};
use crate::sql::word::{quote_literal, quote_name};
use crate::topology::hash::hash_bytes_extended;
use crate::topology::{KeySet, KeyType, in_sql};

/// How far each move's changes are applied here, and marks that are written here to be found in the WAL.
pub const APPLIED: &str = "
CREATE TABLE IF NOT EXISTS weir.move_applied (
    move integer PRIMARY KEY, lsn pg_lsn NOT NULL DEFAULT '0/0', mark bigint NOT NULL DEFAULT 0)";

/// A table whose rows move.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MovedTable {
    pub schema: String,
    pub name: String,
    pub key: String,
    pub key_type: KeyType,
    /// Those that are stored and not generated, in the order of the source.
    pub columns: Vec<String>,
    /// Every value's binary form means the same on every server.
    pub binary: bool,
    /// See [`crate::topology::spread::Spread`].
    pub by_slot: bool,
}

impl MovedTable {
    /// As SQL names it.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_name(&self.schema), quote_name(&self.name))
    }

    /// Which of its keys move with these.
    pub fn moving<'k>(&self, keys: &'k KeySet) -> Cow<'k, KeySet> {
        if self.by_slot { Cow::Owned(KeySet::from(keys.slots().clone())) } else { Cow::Borrowed(keys) }
    }

    /// All its rows.
    pub fn copy_all(&self) -> String {
        format!("COPY (SELECT {} FROM {}) TO STDOUT (FORMAT {})", self.column_list(), self.quoted(), self.format())
    }

    pub fn copy_in(&self) -> String {
        format!("COPY {} ({}) FROM STDIN (FORMAT {})", self.quoted(), self.column_list(), self.format())
    }

    fn format(&self) -> &'static str {
        if self.binary { "binary" } else { "text" }
    }

    fn column_list(&self) -> String {
        self.columns.iter().map(|column| quote_name(column)).collect::<Vec<_>>().join(", ")
    }

    /// The slot of a row, where `row` stands before the key: empty, or a name and a dot.
    fn slot(&self, row: &str) -> String {
        in_sql::slot(&format!("{row}{}", quote_name(&self.key)), self.key_type)
    }
}

/// A move as its servers know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Script {
    id: i32,
    keys: KeySet,
}

impl Script {
    pub fn new(id: i32, keys: &KeySet) -> Script {
        Script { id, keys: keys.clone() }
    }

    pub fn keys(&self) -> &KeySet {
        &self.keys
    }

    /// Of the publication and of the replication slot.
    pub fn name(&self) -> String {
        format!("weir_move_{}", self.id)
    }

    fn fence(&self) -> String {
        format!("weir.move_{}_fence", self.id)
    }

    /// The guard of tables with this key. Named by what it asks, so that tables which come later change nothing for those that have theirs.
    fn guard(&self, table: &MovedTable) -> String {
        let asks = format!("{}\0{}\0{}", table.key, table.key_type.name(), table.by_slot);
        format!("weir.move_{}_guard_{:016x}", self.id, hash_bytes_extended(asks.as_bytes(), 0))
    }

    /// The guard of whole tables.
    fn whole_guard(&self) -> String {
        format!("weir.move_{}_guard_all", self.id)
    }

    fn whole_trigger(&self) -> String {
        format!("{}_all", self.trigger())
    }

    /// Sorted behind all others: BEFORE triggers fire by name, and one of them may change the key.
    pub fn trigger(&self) -> String {
        format!("zzzz_weir_move_{}", self.id)
    }

    /// Does a row of the table move?
    pub fn moves(&self, table: &MovedTable, row: &str) -> String {
        in_sql::inside(&table.moving(&self.keys), &format!("{row}{}", quote_name(&table.key)), table.key_type)
    }

    /// Fence, progress and the guards' functions; may be run again. `open`: the fence is made open, where there is none yet.
    pub fn prepare(&self, tables: &[MovedTable], open: bool) -> String {
        let mut sql = format!(
            "{MAKE_SCHEMA}; {APPLIED}; \
             INSERT INTO weir.move_applied (move) VALUES ({id}) ON CONFLICT DO NOTHING; \
             DO $weir$ BEGIN IF to_regclass('{fence}') IS NULL THEN CREATE SEQUENCE {fence} MINVALUE 1 MAXVALUE 2; \
             PERFORM setval('{fence}', {value}); END IF; END $weir$; ",
            id = self.id,
            fence = self.fence(),
            value = if open { 1 } else { 2 },
        );
        let _ = write!(
            sql,
            "CREATE OR REPLACE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $weir$\n\
             BEGIN RAISE EXCEPTION USING ERRCODE = '55006', CONSTRAINT = 'weir_move', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,\n\
             MESSAGE = 'TRUNCATE has to wait while slots are on their way between shards',\n\
             DETAIL = 'It would take away rows of other slots on the other server (move {id}).',\n\
             HINT = 'Use DELETE, or run it again when the move is over: SHOW MOVES tells how far it is.';\n\
             END $weir$; ",
            guard = self.whole_guard(),
            id = self.id,
        );
        let guards: BTreeMap<String, &MovedTable> = tables.iter().map(|table| (self.guard(table), table)).collect();
        for (guard, table) in guards {
            let _ = write!(
                sql,
                "CREATE OR REPLACE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER \
                 SET search_path = pg_catalog, pg_temp AS $weir$\n\
                 DECLARE moves boolean := false;\n\
                 BEGIN\n\
                 IF TG_OP <> 'INSERT' THEN moves := {old}; END IF;\n\
                 IF TG_OP <> 'DELETE' THEN moves := moves OR {new}; END IF;\n\
                 IF moves AND (NOT pg_catalog.pg_try_advisory_xact_lock_shared({MOVE}, {id}) \
                 OR (SELECT last_value FROM {fence}) <> 1) THEN\n\
                 RAISE EXCEPTION USING ERRCODE = '40001', CONSTRAINT = 'weir_move', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,\n\
                 MESSAGE = 'rows of this key are on another shard, or on their way there',\n\
                 DETAIL = 'This server does not own the slot of the key (move {id}).',\n\
                 HINT = 'Run the transaction again, through weir.';\n\
                 END IF;\n\
                 IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;\n\
                 RETURN NEW;\n\
                 END $weir$; ",
                old = self.moves(table, "OLD."),
                new = self.moves(table, "NEW."),
                id = self.id,
                fence = self.fence(),
            );
        }
        sql
    }

    /// Sets a table's guard; waits for who writes it now. May be run again.
    pub fn set_guard(&self, table: &MovedTable) -> String {
        let (trigger, guard, table) = (self.trigger(), self.guard(table), table.quoted());
        format!(
            "DO $weir$ BEGIN IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {literal}::regclass AND tgname = '{trigger}') THEN \
             CREATE TRIGGER {trigger} BEFORE INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {guard}(); \
             CREATE TRIGGER {whole} BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION {whole_guard}(); \
             END IF; END $weir$",
            whole = self.whole_trigger(),
            whole_guard = self.whole_guard(),
            literal = quote_literal(&table),
        )
    }

    /// Takes a table's guard away.
    pub fn drop_guard(&self, table: &MovedTable) -> String {
        let (each, whole, table) = (self.trigger(), self.whole_trigger(), table.quoted());
        format!("DROP TRIGGER IF EXISTS {each} ON {table}; DROP TRIGGER IF EXISTS {whole} ON {table}")
    }

    /// Drops the publication, if it is there, while nobody writes its tables: a server that looks in the midst of a statement what a table
    /// is published by would find that it is, and then by nothing, and fail ("cache lookup failed for publication").
    fn unpublish(&self) -> String {
        format!(
            "DO $weir$ DECLARE published regclass; BEGIN \
             FOR published IN SELECT r.prrelid::regclass FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid \
             WHERE p.pubname = '{name}' ORDER BY 1 LOOP \
             EXECUTE 'LOCK TABLE ONLY ' || published || ' IN SHARE ROW EXCLUSIVE MODE'; END LOOP; \
             DROP PUBLICATION IF EXISTS {name}; END $weir$; ",
            name = self.name(),
        )
    }

    /// Takes away what [`Script::prepare`] has made; the guards must be gone. Waits for who writes its tables now.
    pub fn forget(&self) -> String {
        format!(
            "DROP SEQUENCE IF EXISTS {fence}; \
             DO $weir$ DECLARE guard text; BEGIN \
             FOR guard IN SELECT oid::regprocedure FROM pg_proc \
             WHERE pronamespace = to_regnamespace('weir') AND proname ~ '^move_{id}_guard_' LOOP \
             EXECUTE 'DROP FUNCTION ' || guard; END LOOP; END $weir$; \
             {unpublish}DO $weir$ BEGIN IF to_regclass('weir.move_applied') IS NOT NULL THEN \
             DELETE FROM weir.move_applied WHERE move = {id}; END IF; END $weir$",
            fence = self.fence(),
            unpublish = self.unpublish(),
            id = self.id,
        )
    }

    /// What the decoder is shown of this server. TRUNCATE is left out: the guards let nobody do it. Where it is made anew, waits for who
    /// writes its tables now.
    pub fn publish(&self, tables: &[MovedTable]) -> String {
        // There may be no other yet.
        let tables: String = tables.iter().flat_map(|table| [table.quoted(), ", ".to_owned()]).collect();
        format!(
            "{unpublish}CREATE PUBLICATION {name} FOR TABLE {tables}weir.move_applied \
             WITH (publish = 'insert, update, delete')",
            unpublish = self.unpublish(),
            name = self.name()
        )
    }

    /// Is there everything that [`Script::prepare`], [`Script::set_guard`] and [`Script::publish`] make, but for the row of
    /// [`Script::ask_applied`]?
    pub fn ask_standing(&self, tables: usize) -> String {
        format!(
            "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname = '{trigger}' AND tgenabled = 'O') = {tables} \
             AND to_regclass('{fence}') IS NOT NULL AND to_regclass('weir.move_applied') IS NOT NULL \
             AND EXISTS (SELECT FROM pg_publication WHERE pubname = '{name}')",
            trigger = self.trigger(),
            fence = self.fence(),
            name = self.name(),
        )
    }

    /// Opens or closes this server's fence. Durable with the commit.
    pub fn set_fence(&self, open: bool) -> String {
        format!("SELECT setval('{}', {})", self.fence(), if open { 1 } else { 2 })
    }

    /// Is there one?
    pub fn has_fence(&self) -> String {
        format!("SELECT to_regclass('{}') IS NOT NULL", self.fence())
    }

    /// Is it open?
    pub fn ask_fence(&self) -> String {
        format!("SELECT last_value = 1 FROM {}", self.fence())
    }

    /// Waits for all who have written rows that move, and keeps others from it.
    pub fn lock(&self) -> String {
        format!("SELECT pg_advisory_lock({MOVE}, {})", self.id)
    }

    pub fn unlock(&self) -> String {
        format!("SELECT pg_advisory_unlock({MOVE}, {})", self.id)
    }

    /// Writes a mark; what comes of the WAL before it has been written before it.
    pub fn mark(&self) -> String {
        format!("UPDATE weir.move_applied SET mark = mark + 1 WHERE move = {} RETURNING mark", self.id)
    }

    /// The first statement of what the mover applies: by it its transactions are known in the WAL.
    pub fn begin_apply(&self) -> String {
        format!("UPDATE weir.move_applied SET lsn = lsn WHERE move = {}", self.id)
    }

    /// The last one: `lsn` is as far as the other side's WAL has been applied.
    pub fn end_apply(&self, lsn: u64) -> String {
        format!("UPDATE weir.move_applied SET lsn = '{:X}/{:X}' WHERE move = {}", lsn >> 32, lsn & 0xffff_ffff, self.id)
    }

    pub fn ask_applied(&self) -> String {
        format!("SELECT (lsn - '0/0')::int8 FROM weir.move_applied WHERE move = {}", self.id)
    }

    /// `within`: a condition on the place of rows.
    pub fn copy_out(&self, table: &MovedTable, within: Option<&str>) -> String {
        let (columns, name, moves, format) =
            (table.column_list(), table.quoted(), self.moves(table, ""), table.format());
        let within = within.map_or_else(String::new, |within| format!("{within} AND "));
        format!("COPY (SELECT {columns} FROM ONLY {name} WHERE {within}{moves}) TO STDOUT (FORMAT {format})")
    }

    /// Rows that are to move, as the planner does not know: in so many of a hundred pages.
    pub fn count(&self, table: &MovedTable, percent: f64) -> String {
        let sample = if percent < 100.0 { format!(" TABLESAMPLE SYSTEM ({percent:.4})") } else { String::new() };
        format!("SELECT count(*) FROM ONLY {}{sample} WHERE {}", table.quoted(), self.moves(table, ""))
    }

    /// Held by who copies, shared: the next attempt waits for the end of the last one, however that ended.
    pub fn copy_lock(&self) -> (i32, i32) {
        (COPIES, self.id)
    }

    /// Per slot the rows, and a sum of their hashes that says whether they are the same.
    pub fn checksum(&self, table: &MovedTable) -> String {
        let columns: Vec<String> = table.columns.iter().map(|column| format!("t.{}", quote_name(column))).collect();
        format!(
            "SELECT {slot} AS slot, count(*), sum(pg_catalog.hashtextextended(ROW({columns})::text, 0)::numeric)::text \
             FROM ONLY {name} AS t WHERE {moves} GROUP BY 1 ORDER BY 1",
            slot = table.slot("t."),
            columns = columns.join(", "),
            name = table.quoted(),
            moves = self.moves(table, "t."),
        )
    }

    /// Deletes the rows that moved, where the fence is closed still: of a side that owns them nothing is deleted, whoever believes that it
    /// should be. `within`: a condition on the place of rows. Errors: the move is over.
    pub fn clear(&self, table: &MovedTable, within: Option<&str>) -> String {
        let within = within.map_or_else(String::new, |within| format!("{within} AND "));
        let (name, moves, fence) = (table.quoted(), self.moves(table, ""), self.fence());
        format!("DELETE FROM ONLY {name} WHERE {within}{moves} AND (SELECT last_value FROM {fence}) = 2")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> MovedTable {
        MovedTable {
            schema: "public".into(),
            name: "Users".into(),
            key: "user_id".into(),
            key_type: KeyType::Int,
            columns: vec!["user_id".into(), "name".into()],
            binary: true,
            by_slot: false,
        }
    }

    #[test]
    fn a_key_that_is_isolated_takes_nothing_of_a_table_by_slot_along() {
        let mut table = users();
        let keys = KeySet::parse("1, +0090000000000001, -0010000000000002").expect("keys");
        assert_eq!(*table.moving(&keys), keys);
        table.by_slot = true;
        assert_eq!(*table.moving(&keys), KeySet::parse("1").expect("slots"));
    }

    #[test]
    fn names_are_quoted_and_bear_the_number() {
        let script = Script::new(7, &KeySet::parse("1").expect("slots"));
        let tables = [users()];
        assert!(script.set_guard(&tables[0]).contains("ON \"public\".\"Users\" FOR EACH ROW"));
        assert!(script.publish(&tables).contains("weir_move_7 FOR TABLE \"public\".\"Users\", weir.move_applied"));
        assert!(tables[0].copy_in().starts_with("COPY \"public\".\"Users\" (\"user_id\", \"name\") FROM"));
        assert_eq!(script.end_apply(0x1_0000_00AB), "UPDATE weir.move_applied SET lsn = '1/AB' WHERE move = 7");
        let (mut orders, mut notes) = (users(), users());
        orders.name = "orders".into();
        notes.key = "note".into();
        let guards = |tables: &[MovedTable]| script.prepare(tables, true).matches("RETURN NEW").count();
        assert_eq!((guards(&[users(), orders.clone()]), guards(&[users(), orders, notes])), (1, 2));
    }
}
