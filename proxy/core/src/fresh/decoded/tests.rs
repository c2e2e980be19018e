//! Messages of transactions against what they have to move.

use bytes::BytesMut;
use weir_wire::pgoutput::read_message;

use super::*;
use crate::topology::catalog::{Column, Relation as Known1};

const T: &str = "orders";

fn column(name: &str, type_oid: u32) -> Column {
    Column { name: name.into(), type_oid, byte_order: true, not_null: false, default: DefaultKind::None }
}

fn table(kind: RelationKind, columns: &[(&str, u32)], reads: &[&str]) -> Known1 {
    Known1 {
        kind,
        columns: columns.iter().map(|(name, oid)| column(name, *oid)).collect(),
        writes_spread: false,
        referenced: false,
        unique_columns: Vec::new(),
        reads: reads.iter().map(|name| ("public".into(), (*name).into())).collect(),
        triggers: Vec::new(),
    }
}

/// `orders` is sharded by user_id, `part` is a partition of `parted`, `plain` is not declared.
fn schema() -> (Catalog, TableRules) {
    let mut catalog = Catalog::default();
    let public = catalog.relations.entry("public".into()).or_default();
    let order = [("id", 20), ("user_id", 20), ("note", 25)];
    public.insert(T.into(), table(RelationKind::PlainTable, &order, &[]));
    public.insert("plain".into(), table(RelationKind::PlainTable, &[("id", 20)], &[]));
    public.insert("part".into(), table(RelationKind::OtherTable, &[("id", 20)], &["parted"]));
    let mut rules = TableRules::default();
    rules.insert("public", T, Placement::Sharded { key: "user_id".into(), key_type: KeyType::Int });
    (catalog, rules)
}

/// A stream in the making.
struct Wire {
    decoded: Decoded,
    catalog: Catalog,
    rules: TableRules,
    /// Number of the streamed transaction, or 0.
    part: u32,
}

impl Wire {
    fn new() -> Self {
        let (catalog, rules) = schema();
        Wire { decoded: Decoded::default(), catalog, rules, part: 0 }
    }

    fn take(&mut self, kind: u8, body: &[u8]) -> Result<Option<Committed>, OutOfOrder> {
        let mut message = BytesMut::new();
        message.extend_from_slice(&[kind]);
        if self.part != 0 && !matches!(kind, b'B' | b'C' | b'S' | b'E' | b'c' | b'A') {
            message.extend_from_slice(&self.part.to_be_bytes());
        }
        message.extend_from_slice(body);
        let message = read_message(&message, self.decoded.is_streamed()).expect("well formed");
        self.decoded.on_message(&message, Known { catalog: &self.catalog, rules: &self.rules, version: 1 })
    }

    fn give(&mut self, kind: u8, body: &[u8]) -> Option<Committed> {
        self.take(kind, body).expect("in order")
    }

    fn begin(&mut self, xid: u32) {
        self.give(b'B', &[&[0; 16][..], &xid.to_be_bytes()].concat());
    }

    fn commit(&mut self) -> Option<Committed> {
        self.give(b'C', &[0; 25])
    }

    fn stream(&mut self, xid: u32) {
        self.give(b'S', &[&xid.to_be_bytes()[..], &[1]].concat());
        self.part = xid;
    }

    fn stop(&mut self) {
        self.give(b'E', &[]);
        self.part = 0;
    }

    fn stream_commit(&mut self, xid: u32) -> Option<Committed> {
        self.give(b'c', &[&xid.to_be_bytes()[..], &[0; 25]].concat())
    }

    /// Tells a relation; columns with a star are part of the identity.
    fn relation(&mut self, id: u32, name: &str, columns: &[(&str, u32)]) {
        let mut body = [&id.to_be_bytes()[..], b"public\0", name.as_bytes(), b"\0d"].concat();
        body.extend((columns.len() as u16).to_be_bytes());
        for (name, oid) in columns {
            body.push(u8::from(name.ends_with('*')));
            body.extend(name.trim_end_matches('*').as_bytes());
            body.push(0);
            body.extend(oid.to_be_bytes());
            body.extend([0xff; 4]);
        }
        self.give(b'R', &body);
    }

    fn orders(&mut self, identity: &str) {
        let name = |name: &'static str, marked: &'static str| if identity.contains(name) { marked } else { name };
        self.relation(7, T, &[(name("id", "id*"), 20), (name("user_id", "user_id*"), 20), (name("note", "note*"), 25)]);
    }

    fn insert(&mut self, relation: u32, values: &[&str]) {
        self.give(b'I', &[&relation.to_be_bytes()[..], b"N", &tuple(values)].concat());
    }

    fn update(&mut self, old: Option<(u8, &[&str])>, new: &[&str]) {
        let old = old.map_or(Vec::new(), |(kind, values)| [&[kind][..], &tuple(values)].concat());
        self.give(b'U', &[&7_u32.to_be_bytes()[..], &old, b"N", &tuple(new)].concat());
    }

    fn delete(&mut self, kind: u8, old: &[&str]) {
        self.give(b'D', &[&7_u32.to_be_bytes()[..], &[kind], &tuple(old)].concat());
    }
}

/// "null" and "same" (not sent) are those; anything else is text.
fn tuple(values: &[&str]) -> Vec<u8> {
    let mut bytes = (values.len() as u16).to_be_bytes().to_vec();
    for value in values {
        match *value {
            "null" => bytes.push(b'n'),
            "same" => bytes.push(b'u'),
            text => {
                bytes.push(b't');
                bytes.extend((text.len() as u32).to_be_bytes());
                bytes.extend(text.as_bytes());
            }
        }
    }
    bytes
}

fn of(name: &str) -> TableHash {
    TableHash::of("public", name)
}

fn keyed(keys: &[i64]) -> Vec<Dependency> {
    let key = |key: &i64| Dependency::Key(of(T), KeyHash(Key::Int(*key).hash()));
    std::iter::once(Dependency::Table(of(T))).chain(keys.iter().map(key)).collect()
}

fn whole(name: &str) -> Vec<Dependency> {
    vec![Dependency::Table(of(name)), Dependency::Keyless(of(name))]
}

/// One transaction on `orders` with this identity.
fn wrote(identity: &str, changes: impl FnOnce(&mut Wire)) -> Vec<Dependency> {
    let mut wire = Wire::new();
    wire.begin(9);
    wire.orders(identity);
    changes(&mut wire);
    let committed = wire.commit().expect("something was written");
    assert_eq!((committed.xid, committed.schema_changed), (9, false));
    committed.writes.to_vec()
}

#[test]
fn rows_count_by_their_keys_before_and_after() {
    assert_eq!(wrote("id", |wire| wire.insert(7, &["1", "42", "x"])), keyed(&[42]));
    assert_eq!(wrote("id user_id", |wire| wire.update(None, &["1", "42", "same"])), keyed(&[42]));
    let moved = |wire: &mut Wire| wire.update(Some((b'K', &["1", "42", "null"])), &["1", "43", "x"]);
    assert_eq!(wrote("id user_id", moved), keyed(&[42, 43]));
    let moved = |wire: &mut Wire| wire.update(Some((b'O', &["1", "42", "x"])), &["1", "43", "x"]);
    assert_eq!(wrote("id user_id note", moved), keyed(&[42, 43]));
    assert_eq!(wrote("id user_id", |wire| wire.delete(b'K', &["1", "42", "null"])), keyed(&[42]));
    assert_eq!(wrote("", |wire| wire.delete(b'O', &["1", "42", "x"])), keyed(&[42]));
}

#[test]
fn a_key_that_is_not_told_makes_the_write_keyless() {
    assert_eq!(wrote("id", |wire| wire.update(None, &["1", "42", "x"])), whole(T), "the key may have been another");
    assert_eq!(wrote("id", |wire| wire.update(Some((b'K', &["1", "null", "null"])), &["2", "42", "x"])), whole(T));
    assert_eq!(wrote("id", |wire| wire.delete(b'K', &["1", "null", "null"])), whole(T));
    assert_eq!(wrote("id", |wire| wire.insert(7, &["1", "null", "x"])), whole(T));
    assert_eq!(wrote("user_id", |wire| wire.update(None, &["1", "same", "x"])), whole(T));
    assert_eq!(wrote("id", |wire| wire.insert(7, &["1"])), whole(T));
    let truncate = |wire: &mut Wire| drop(wire.give(b'T', b"\0\0\0\x01\0\0\0\0\x07"));
    assert_eq!(wrote("id", truncate), whole(T));
    let many = |wire: &mut Wire| (0..=KEYS_MAX).for_each(|key| wire.insert(7, &["1", &key.to_string(), "x"]));
    assert_eq!(wrote("id", many), whole(T));
    let repeated = |wire: &mut Wire| (0..1000).for_each(|row| wire.insert(7, &[&row.to_string(), "42", "x"]));
    assert_eq!(wrote("id", repeated), keyed(&[42]));
}

#[test]
fn other_tables_count_as_wholes_with_what_they_are_part_of() {
    let mut wire = Wire::new();
    wire.begin(9);
    wire.relation(8, "plain", &[("id*", 20)]);
    wire.insert(8, &["1"]);
    assert_eq!(wire.commit().expect("written").writes.to_vec(), whole("plain"));
    wire.begin(10);
    wire.relation(9, "part", &[("id*", 20)]);
    wire.insert(9, &["1"]);
    let writes = wire.commit().expect("written").writes;
    for dependency in whole("part").iter().chain(&whole("parted")) {
        assert!(writes.contains(dependency), "{dependency:?}");
    }
    wire.begin(11);
    assert_eq!(wire.commit(), None, "nothing was written");
}

#[test]
fn what_the_catalogue_does_not_know_counts_as_anything() {
    for (name, columns) in [
        ("unknown", &[("id*", 20)][..]),
        ("plain", &[("id*", 20), ("added", 25)]),
        ("plain", &[("id*", 23)]),
        ("plain", &[("renamed", 20)]),
    ] {
        let mut wire = Wire::new();
        wire.begin(9);
        wire.relation(8, name, columns);
        wire.insert(8, &["1"]);
        let committed = wire.commit().expect("written");
        assert_eq!((committed.writes.to_vec(), committed.schema_changed), (vec![Dependency::Anything], true), "{name}");
        // Once it has been said, only a relation that is not known at all is worth repeating.
        wire.begin(10);
        wire.insert(8, &["1"]);
        let again = wire.commit().expect("written");
        assert!(!again.schema_changed);
    }
    let mut wire = Wire::new();
    wire.catalog
        .relations
        .get_mut("public")
        .expect("there")
        .get_mut("plain")
        .expect("there")
        .columns
        .push(Column { default: DefaultKind::Generated, ..column("sum", 20) });
    wire.begin(9);
    wire.relation(8, "plain", &[("id*", 20)]);
    wire.insert(8, &["1"]);
    assert!(!wire.commit().expect("written").schema_changed, "generated columns are not told");
}

#[test]
fn a_message_of_ddl_is_a_write_of_anything() {
    let mut wire = Wire::new();
    let message = [b"\x01\0\0\0\0\0\0\0\x05weir\0".as_slice(), b"\0\0\0\x03ddl"].concat();
    wire.begin(9);
    wire.give(b'M', &message);
    let committed = wire.commit().expect("written");
    assert_eq!((committed.writes.to_vec(), committed.schema_changed), (vec![Dependency::Anything], true));
    let outside = [b"\0\0\0\0\0\0\0\0\x05weir\0".as_slice(), b"\0\0\0\x03ddl"].concat();
    assert_eq!(wire.take(b'M', &outside), Ok(None));
    wire.begin(10);
    wire.give(b'M', b"\x01\0\0\0\0\0\0\0\x05other\0\0\0\0\0");
    assert_eq!(wire.commit(), None);
}

#[test]
fn more_tables_than_are_kept_are_anything() {
    let mut wire = Wire::new();
    for number in 0..=TABLES_MAX {
        let name = format!("t{number}");
        let public = wire.catalog.relations.get_mut("public").expect("there");
        public.insert(name.into(), table(RelationKind::PlainTable, &[("id", 20)], &[]));
    }
    wire.begin(9);
    for number in 0..=TABLES_MAX as u32 {
        wire.relation(100 + number, &format!("t{number}"), &[("id*", 20)]);
        wire.insert(100 + number, &["1"]);
    }
    assert_eq!(wire.commit().expect("written").writes.to_vec(), [Dependency::Anything]);
}

#[test]
fn streamed_transactions_interleave_and_count_when_they_commit() {
    let mut wire = Wire::new();
    wire.stream(9);
    wire.orders("id user_id");
    wire.insert(7, &["1", "42", "x"]);
    wire.stop();
    wire.stream(10);
    wire.orders("id user_id");
    wire.insert(7, &["1", "50", "x"]);
    wire.stop();
    wire.begin(11);
    wire.orders("id user_id");
    wire.insert(7, &["1", "60", "x"]);
    assert_eq!(wire.decoded.open_count(), 3);
    assert_eq!(wire.commit().expect("written").writes.to_vec(), keyed(&[60]));
    wire.stream(9);
    wire.insert(7, &["2", "43", "x"]);
    wire.stop();
    // A part of it is rolled back; what it wrote still counts.
    wire.give(b'A', &[9_u32.to_be_bytes(), 99_u32.to_be_bytes()].concat());
    assert_eq!(wire.stream_commit(9).expect("written").writes.to_vec(), keyed(&[42, 43]));
    wire.give(b'A', &[10_u32.to_be_bytes(), 10_u32.to_be_bytes()].concat());
    assert!(wire.take(b'c', &[&10_u32.to_be_bytes()[..], &[0; 25]].concat()).is_err(), "it was rolled back");
    assert_eq!(wire.decoded.open_count(), 0);
}

#[test]
fn a_relation_told_within_a_stream_is_its_own_until_it_commits() {
    let mut wire = Wire::new();
    wire.begin(8);
    wire.orders("id user_id");
    wire.insert(7, &["1", "42", "x"]);
    assert!(wire.commit().is_some());
    wire.stream(9);
    wire.relation(7, T, &[("user_id*", 20)]);
    wire.insert(7, &["5"]);
    wire.stop();
    wire.begin(10);
    wire.insert(7, &["1", "42", "x"]);
    assert_eq!(wire.commit().expect("written").writes.to_vec(), keyed(&[42]));
    assert!(wire.stream_commit(9).expect("written").schema_changed);
    wire.begin(11);
    wire.insert(7, &["6"]);
    assert_eq!(wire.commit().expect("written").writes.to_vec(), keyed(&[6]));
}

#[test]
fn messages_out_of_order_are_refused() {
    let mut wire = Wire::new();
    assert!(wire.take(b'C', &[0; 25]).is_err());
    assert!(wire.take(b'E', &[]).is_err());
    assert!(wire.take(b'I', &[&7_u32.to_be_bytes()[..], b"N", &tuple(&["1"])].concat()).is_err());
    wire.begin(9);
    assert!(wire.take(b'B', &[0; 20]).is_err());
    assert!(wire.take(b'I', &[&7_u32.to_be_bytes()[..], b"N", &tuple(&["1"])].concat()).is_err(), "not told");
}

#[test]
fn a_snapshot_shows_what_is_over() {
    let snapshot = Snapshot::parse("10:20:10,14").expect("valid");
    assert_eq!((snapshot.xmin, snapshot.xmax), (10, 20));
    for (xid, shown) in [(9, true), (10, false), (11, true), (14, false), (19, true), (20, false), (21, false)] {
        assert_eq!(snapshot.shows(xid), shown, "{xid}");
    }
    assert!(Snapshot::parse("10:10:").is_some_and(|snapshot| snapshot.shows(9) && !snapshot.shows(10)));
    // Numbers of the WAL have no epoch.
    let wrapped = Snapshot::parse("4294967290:4294967300:4294967291,4294967299").expect("valid");
    for (xid, shown) in [(u32::MAX, true), (4_294_967_291, false), (3, false), (2, true), (4, false), (100, false)] {
        assert_eq!(wrapped.shows(xid), shown, "{xid}");
    }
    for bad in ["", "1:2", "a:2:", "1:2:x"] {
        assert_eq!(Snapshot::parse(bad), None, "{bad}");
    }
}
