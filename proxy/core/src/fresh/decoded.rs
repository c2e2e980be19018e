//! From changes decoded out of the WAL to the dependencies they move: writes that went round weir, and its own once more.
//!
//! Invariant: every change of a row that any plan could have read names at least the dependencies which that plan's own writes
//! of the row would have raised. Where a key cannot be told (it is no part of the replica identity, its value was not sent, its
//! relation is not as the catalogue says), the table counts as written without a key, or anything as written. Nothing is told
//! of a transaction before its commit, and nothing of one that was rolled back.
//!
//! What is kept of an open transaction is bounded: from [`KEYS_MAX`] keys of a table on it was written without a key, from
//! [`TABLES_MAX`] tables on anything was. Non-goals: when a commit is visible, and what to do about it.

use std::borrow::Cow;

use hashbrown::HashMap;
use smallvec::SmallVec;
use weir_wire::pgoutput::{Message, Old, Relation, Tuple, Value};

use super::{Dependencies, Dependency, KeyHash, TableHash};
use crate::topology::catalog::{Catalog, DefaultKind, RelationKind};
use crate::topology::{Key, KeyType, Placement, TableRules};

/// More keys of one table in one transaction count as a write without a key.
pub const KEYS_MAX: usize = 32;
/// More tables in one transaction count as a write of anything.
pub const TABLES_MAX: usize = 64;
/// Transactions that may be streamed at the same time: more than a server has connections and prepared transactions.
const STREAMS_MAX: usize = 1 << 20;
/// Relations that are remembered; a server tells them anew as it needs them after a reconnect.
const RELATIONS_MAX: usize = 1 << 20;
/// OIDs below are the same on every server (FirstNormalObjectId).
const OID_FIXED_MAX: u32 = 16_384;

/// Prefix and content of the message by which a server tells of DDL (pg_logical_emit_message).
pub const MESSAGE_PREFIX: &str = "weir";
pub const MESSAGE_DDL: &str = "ddl";

/// What changes are held against. `version` must change whenever the others do.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    pub catalog: &'a Catalog,
    pub rules: &'a TableRules,
    pub version: u64,
}

/// A transaction that has committed, and what it wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed {
    pub xid: u32,
    /// Where its commit record ends.
    pub end_lsn: u64,
    /// Microseconds since 2000-01-01, by the server's clock.
    pub committed_at: i64,
    /// Empty: nothing that weir reads.
    pub writes: Dependencies,
    /// The schema is, or may be, another now.
    pub schema_changed: bool,
}

/// The messages do not follow each other as the protocol says, or are more than any server would send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("replication messages out of order: {0}")]
pub struct OutOfOrder(&'static str);

/// One stream of messages, from its begin on.
#[derive(Default)]
pub struct Decoded {
    relations: Relations,
    /// The transaction whose changes are coming.
    open: Option<Open>,
    /// Transactions that will go on later.
    streams: HashMap<u32, Open, foldhash::fast::RandomState>,
}

type Relations = HashMap<u32, Seen, foldhash::fast::RandomState>;

/// A transaction that has not ended.
struct Open {
    xid: u32,
    streamed: bool,
    written: Written,
    /// Relations as they look within it; for everybody once it has committed. Only where it is streamed.
    told: Relations,
}

/// A relation as the stream has told it, and what a change of it touches.
struct Seen {
    schema: Box<str>,
    name: Box<str>,
    columns: Vec<SeenColumn>,
    /// For [`Known::version`].
    version: u64,
    touches: Touches,
}

struct SeenColumn {
    name: Box<str>,
    type_oid: u32,
    identifies: bool,
}

/// What a change of one of its rows touches.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Touches {
    Anything,
    /// Whole tables: itself, and what its rows are also part of.
    Tables(SmallVec<[TableHash; 1]>),
    Keyed {
        table: TableHash,
        column: usize,
        key_type: KeyType,
        /// The key is part of the replica identity: it is told whenever it changes.
        identifies: bool,
    },
}

/// What a transaction has written so far.
#[derive(Default)]
struct Written {
    anything: bool,
    schema_changed: bool,
    tables: HashMap<TableHash, Keys, foldhash::fast::RandomState>,
}

#[derive(Default)]
struct Keys {
    keys: SmallVec<[KeyHash; 2]>,
    keyless: bool,
}

impl Decoded {
    /// Do messages that come now carry the number of their transaction?
    pub fn is_streamed(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.streamed)
    }

    /// Transactions that are under way: one, or those that are streamed.
    pub fn open_count(&self) -> usize {
        self.streams.len() + usize::from(self.open.is_some())
    }

    /// Takes the next message. `Some`: a transaction has committed that concerns weir.
    pub fn on_message(&mut self, message: &Message<'_>, known: Known<'_>) -> Result<Option<Committed>, OutOfOrder> {
        match message {
            Message::Begin { xid, .. } => self.begin(Open::new(*xid, false))?,
            Message::Commit { end_lsn, committed_at, .. } => {
                let open = self.open.take().filter(|open| !open.streamed).ok_or(OutOfOrder("a commit of nothing"))?;
                return Ok(open.written.committed(open.xid, *end_lsn, *committed_at));
            }
            Message::StreamStart { xid, .. } => {
                let open = self.streams.remove(xid).unwrap_or_else(|| Open::new(*xid, true));
                self.begin(open)?;
            }
            Message::StreamStop => {
                let open = self.open.take().filter(|open| open.streamed).ok_or(OutOfOrder("the end of no block"))?;
                if self.streams.len() >= STREAMS_MAX {
                    return Err(OutOfOrder("too many transactions are streamed"));
                }
                self.streams.insert(open.xid, open);
            }
            Message::StreamCommit { xid, end_lsn, committed_at, .. } => {
                let open = self.streams.remove(xid).ok_or(OutOfOrder("a commit of no streamed transaction"))?;
                self.relations.extend(open.told);
                return Ok(open.written.committed(*xid, *end_lsn, *committed_at));
            }
            // What a part that was rolled back wrote stays noted: which of the words were its own is not kept.
            Message::StreamAbort { xid, part } => {
                if xid == part {
                    self.streams.remove(xid);
                }
            }
            Message::Relation { relation, .. } => self.relation(relation, known)?,
            Message::Insert { relation, new, .. } => {
                self.change(*relation, known, |written, touches| written.row(touches, new, true))?;
            }
            Message::Update { relation, old, new, .. } => {
                self.change(*relation, known, |written, touches| written.update(touches, old.as_ref(), new))?;
            }
            Message::Delete { relation, old, .. } => {
                let whole = matches!(old, Old::Row(_));
                self.change(*relation, known, |written, touches| written.row(touches, old.tuple(), whole))?;
            }
            Message::Truncate { relations, .. } => {
                for relation in relations {
                    self.change(*relation, known, Written::whole)?;
                }
            }
            Message::Message { transactional: true, prefix, content, .. } => {
                if *prefix == MESSAGE_PREFIX.as_bytes() && *content == MESSAGE_DDL.as_bytes() {
                    self.open_one()?.written.schema();
                }
            }
            Message::Message { .. } | Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(None)
    }

    fn begin(&mut self, open: Open) -> Result<(), OutOfOrder> {
        if self.open.is_some() {
            return Err(OutOfOrder("a transaction within another"));
        }
        self.open = Some(open);
        Ok(())
    }

    fn open_one(&mut self) -> Result<&mut Open, OutOfOrder> {
        self.open.as_mut().ok_or(OutOfOrder("a change outside of a transaction"))
    }

    /// A relation is told before its first change and whenever it may look otherwise.
    fn relation(&mut self, relation: &Relation<'_>, known: Known<'_>) -> Result<(), OutOfOrder> {
        let seen = Seen::new(relation, known);
        let open = self.open.as_mut().ok_or(OutOfOrder("a relation outside of a transaction"))?;
        if !seen.is_as_known(known.catalog) {
            open.written.schema();
        }
        let told = if open.streamed { &mut open.told } else { &mut self.relations };
        if told.len() >= RELATIONS_MAX {
            return Err(OutOfOrder("too many relations"));
        }
        told.insert(relation.id, seen);
        Ok(())
    }

    fn change(
        &mut self,
        relation: u32,
        known: Known<'_>,
        note: impl FnOnce(&mut Written, &Touches),
    ) -> Result<(), OutOfOrder> {
        let open = self.open.as_mut().ok_or(OutOfOrder("a change outside of a transaction"))?;
        let seen = match open.told.get_mut(&relation) {
            Some(seen) => seen,
            None => self.relations.get_mut(&relation).ok_or(OutOfOrder("a change of a relation that was not told"))?,
        };
        if seen.version != known.version {
            seen.touches = seen.touched(known);
            seen.version = known.version;
        }
        if !open.written.anything {
            note(&mut open.written, &seen.touches);
        }
        Ok(())
    }
}

impl Open {
    fn new(xid: u32, streamed: bool) -> Self {
        Open { xid, streamed, written: Written::default(), told: Relations::default() }
    }
}

impl Seen {
    fn new(relation: &Relation<'_>, known: Known<'_>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned().into_boxed_str();
        let column = |column: &weir_wire::pgoutput::Column<'_>| SeenColumn {
            name: text(column.name),
            type_oid: column.type_oid,
            identifies: column.identifies,
        };
        let mut seen = Seen {
            schema: text(relation.schema),
            name: text(relation.name),
            columns: relation.columns.iter().map(column).collect(),
            version: known.version,
            touches: Touches::Anything,
        };
        seen.touches = seen.touched(known);
        seen
    }

    /// As plans see it: a plain sharded table by its key, another plain table as a whole. Partitions, children and what else
    /// shares its rows with others count with all of those.
    fn touched(&self, known: Known<'_>) -> Touches {
        let Some(relation) = known.catalog.relation(&self.schema, &self.name) else { return Touches::Anything };
        let table = TableHash::of(&self.schema, &self.name);
        if relation.kind != RelationKind::PlainTable {
            let others = relation.reads.iter().map(|(schema, name)| TableHash::of(schema, name));
            return Touches::Tables(std::iter::once(table).chain(others).collect());
        }
        if let Placement::Sharded { key, key_type } = known.rules.placement(&self.schema, &self.name)
            && let Some(column) = self.columns.iter().position(|column| column.name == *key)
        {
            return Touches::Keyed { table, column, key_type: *key_type, identifies: self.columns[column].identifies };
        }
        Touches::Tables(SmallVec::from_elem(table, 1))
    }

    /// Has it the columns that the catalogue knows? Types made by users have other numbers on other servers. What the server
    /// computes from other columns need not be told.
    fn is_as_known(&self, catalog: &Catalog) -> bool {
        let Some(relation) = catalog.relation(&self.schema, &self.name) else { return false };
        let stored = relation.columns.iter().filter(|column| column.default != DefaultKind::Generated);
        let generated = |name: &str| {
            let mut columns = relation.columns.iter();
            columns.any(|column| *column.name == *name && column.default == DefaultKind::Generated)
        };
        let told = self.columns.iter().filter(|column| !generated(&column.name));
        let same_type = |one: u32, other: u32| one == other || one >= OID_FIXED_MAX || other >= OID_FIXED_MAX;
        stored.clone().count() == told.clone().count()
            && stored.zip(told).all(|(known, told)| known.name == told.name && same_type(known.type_oid, told.type_oid))
    }
}

impl Written {
    fn schema(&mut self) {
        self.schema_changed = true;
        self.everything();
    }

    fn everything(&mut self) {
        self.anything = true;
        self.tables = HashMap::default();
    }

    fn keys(&mut self, table: TableHash) -> Option<&mut Keys> {
        if self.tables.len() >= TABLES_MAX && !self.tables.contains_key(&table) {
            self.everything();
            return None;
        }
        Some(self.tables.entry(table).or_default())
    }

    fn keyless(&mut self, table: TableHash) {
        if let Some(keys) = self.keys(table) {
            *keys = Keys { keyless: true, keys: SmallVec::new() };
        }
    }

    fn whole(&mut self, touches: &Touches) {
        match touches {
            Touches::Anything => self.everything(),
            Touches::Tables(tables) => tables.iter().for_each(|table| self.keyless(*table)),
            Touches::Keyed { table, .. } => self.keyless(*table),
        }
    }

    /// One whole row, or (`!whole`) the columns of its identity.
    fn row(&mut self, touches: &Touches, tuple: &Tuple<'_>, whole: bool) {
        match touches {
            Touches::Keyed { table, column, key_type, identifies } if whole || *identifies => {
                match hash_of(tuple, *column, *key_type) {
                    Some(key) => self.key(*table, key),
                    None => self.keyless(*table),
                }
            }
            _ => self.whole(touches),
        }
    }

    fn update(&mut self, touches: &Touches, old: Option<&Old<'_>>, new: &Tuple<'_>) {
        let Touches::Keyed { table, column, key_type, identifies } = touches else { return self.whole(touches) };
        let before = match old {
            Some(Old::Row(row)) => hash_of(row, *column, *key_type),
            Some(Old::Key(key)) if *identifies => hash_of(key, *column, *key_type),
            // The identity has not changed, and with it the key.
            None if *identifies => hash_of(new, *column, *key_type),
            Some(Old::Key(_)) | None => None,
        };
        let after = match new.get(*column) {
            Some(Value::Unchanged) => before,
            _ => hash_of(new, *column, *key_type),
        };
        match (before, after) {
            (Some(before), Some(after)) => {
                self.key(*table, before);
                self.key(*table, after);
            }
            _ => self.keyless(*table),
        }
    }

    fn key(&mut self, table: TableHash, key: KeyHash) {
        let Some(noted) = self.keys(table) else { return };
        if noted.keyless || noted.keys.contains(&key) {
            return;
        }
        if noted.keys.len() >= KEYS_MAX {
            *noted = Keys { keyless: true, keys: SmallVec::new() };
        } else {
            noted.keys.push(key);
        }
    }

    fn committed(self, xid: u32, end_lsn: u64, committed_at: i64) -> Option<Committed> {
        let mut writes = Dependencies::new();
        if self.anything {
            writes.push(Dependency::Anything);
        }
        for (table, keys) in &self.tables {
            writes.push(Dependency::Table(*table));
            if keys.keyless {
                writes.push(Dependency::Keyless(*table));
            }
            writes.extend(keys.keys.iter().map(|key| Dependency::Key(*table, *key)));
        }
        let schema_changed = self.schema_changed;
        (!writes.is_empty()).then_some(Committed { xid, end_lsn, committed_at, writes, schema_changed })
    }
}

/// `None`: null, not sent, or not a value of that type.
fn hash_of(tuple: &Tuple<'_>, column: usize, key_type: KeyType) -> Option<KeyHash> {
    let key = match tuple.get(column)? {
        Value::Text(text) => Key::parse(Cow::Borrowed(text), key_type),
        Value::Binary(bytes) => Key::from_binary(bytes, key_type),
        Value::Null | Value::Unchanged => None,
    }?;
    Some(KeyHash(key.hash()))
}

// ---- visibility -------------------------------------------------------------------------------------------------------

/// What a server shows and what not yet: `pg_current_snapshot()`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Everything below is over.
    pub xmin: u64,
    /// Nothing from here on has begun.
    pub xmax: u64,
    under_way: Vec<u64>,
}

impl Snapshot {
    /// `xmin:xmax:xip,xip…` (src/backend/utils/adt/xid8funcs.c).
    pub fn parse(text: &str) -> Option<Snapshot> {
        let mut parts = text.splitn(3, ':');
        let (xmin, xmax, list) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
        let numbers = list.split(',').filter(|number| !number.is_empty());
        let under_way = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Snapshot { xmin, xmax, under_way })
    }

    /// Is a transaction over, for everybody who asks from now on? `xid`: without its epoch, as the WAL has it; transactions
    /// that are less than 2^31 away from `xmax` can be told.
    pub fn shows(&self, xid: u32) -> bool {
        let behind = (self.xmax as u32).wrapping_sub(xid) as i32;
        behind > 0 && !self.under_way.contains(&(self.xmax.wrapping_sub(behind as u64)))
    }
}

#[cfg(test)]
mod tests;
