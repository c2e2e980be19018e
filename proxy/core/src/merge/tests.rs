//! The merger against a model: random rows are split over sources, sorted or aggregated there by the model, merged, and
//! must equal the model's answer over the union. Then the types one by one, limits, refusals and the calling order.

mod folds;
mod models;
mod types;

use bytes::{Buf, BytesMut};

use super::row::RowBuilder;
use super::*;

const ROOMY: MergeLimits = MergeLimits { buffered_bytes_max: 1 << 24, groups_max: 1 << 16 };
const INT8: u32 = 20;
const TEXT: u32 = 25;
const NUMERIC: u32 = 1700;
const FLOAT8: u32 = 701;
const BOOL: u32 = 16;

/// Values of one row as text; `None` is null.
type Cells = Vec<Option<Vec<u8>>>;

fn text_columns(oids: &[u32]) -> Vec<ResultColumn> {
    oids.iter().map(|&type_oid| ResultColumn { type_oid, type_modifier: -1, binary: false, rounded: false }).collect()
}

fn binary_columns(oids: &[u32]) -> Vec<ResultColumn> {
    oids.iter().map(|&type_oid| ResultColumn { type_oid, type_modifier: -1, binary: true, rounded: false }).collect()
}

fn body(cells: &Cells) -> Vec<u8> {
    let mut builder = RowBuilder::new(cells.len());
    for cell in cells {
        builder.push(cell.as_deref());
    }
    builder.finish()
}

fn cells(texts: &[&str]) -> Cells {
    texts.iter().map(|text| (*text != "null").then(|| text.as_bytes().to_vec())).collect()
}

fn frames(mut out: BytesMut) -> Vec<Cells> {
    let mut rows = Vec::new();
    while out.has_remaining() {
        assert_eq!(out.get_u8(), b'D');
        let length = out.get_u32() as usize - 4;
        let mut frame = out.split_to(length);
        let columns = frame.get_u16();
        let row = (0..columns).map(|_| match frame.get_i32() {
            -1 => None,
            length => Some(frame.split_to(length as usize).to_vec()),
        });
        rows.push(row.collect());
        assert!(!frame.has_remaining());
    }
    rows
}

/// Runs a merger to its end the way a caller does: feeds what it wants, polls after every step.
fn run(mut merger: Merger, sources: &[Vec<Cells>]) -> Result<Vec<Cells>, UserError> {
    let mut next = vec![0; sources.len()];
    // Highest first, so that arrival order and source order differ.
    let mut open: Vec<usize> = (0..sources.len()).rev().collect();
    let mut feed = |merger: &mut Merger, open: &mut Vec<usize>, source: usize| match sources[source].get(next[source]) {
        Some(row) => {
            next[source] += 1;
            merger.push(source, &body(row))
        }
        None => {
            merger.finish(source);
            open.retain(|other| *other != source);
            Ok(())
        }
    };
    let mut out = BytesMut::new();
    let mut turn = 0;
    let mut rows = 0;
    while !merger.done() {
        match merger.wants() {
            Wants::All => {
                let source = open[turn % open.len()];
                turn += 1;
                feed(&mut merger, &mut open, source)?;
            }
            Wants::One(source) => feed(&mut merger, &mut open, source)?,
            Wants::Nothing => {}
        }
        rows += merger.poll(&mut out)?;
    }
    assert_eq!(merger.rows(), rows as u64);
    assert_eq!(merger.poll(&mut out)?, 0, "nothing comes after done");
    let frames = frames(out);
    assert_eq!(frames.len(), rows);
    Ok(frames)
}

fn merge(spec: MergeSpec, columns: Vec<ResultColumn>, sources: &[Vec<Cells>]) -> Result<Vec<Cells>, UserError> {
    run(Merger::new(spec, columns, sources.len(), ROOMY)?, sources)
}

fn ascending(column: usize) -> OrderKey {
    OrderKey { column, descending: false, nulls_first: false, byte_order: true }
}

fn window<T>(rows: Vec<T>, offset: u64, limit: Option<u64>) -> Vec<T> {
    rows.into_iter().skip(offset as usize).take(limit.map_or(usize::MAX, |limit| limit as usize)).collect()
}

/// avg(x) in column 0 from hidden sum and count.
fn average() -> MergeSpec {
    let folds = vec![Fold { column: 0, kind: FoldKind::Avg { sum: 1, count: 2 } }];
    MergeSpec {
        hidden: 2,
        group: Some(GroupSpec { keys: vec![], folds, ..GroupSpec::default() }),
        ..MergeSpec::default()
    }
}

// ---- refusals, bounds, calling order ----

#[test]
fn what_cannot_be_exact_is_refused_before_the_first_row() {
    let refusal = |spec: MergeSpec, oids: &[u32]| match Merger::new(spec, text_columns(oids), 2, ROOMY) {
        Ok(_) => None,
        Err(error) => {
            assert!(error.detail.is_some() && error.hint.is_some());
            Some(error.sqlstate)
        }
    };
    let group = |kind| MergeSpec {
        group: Some(GroupSpec { keys: vec![], folds: vec![Fold { column: 0, kind }], ..GroupSpec::default() }),
        ..MergeSpec::default()
    };
    let unproven = MergeSpec { order: vec![OrderKey { byte_order: false, ..ascending(0) }], ..MergeSpec::default() };
    for collated in [25, 1042, 1043] {
        assert_eq!(refusal(unproven.clone(), &[collated]), Some("0A000"));
        assert_eq!(refusal(group(FoldKind::Min { byte_order: false }), &[collated]), Some("0A000"));
        assert_eq!(refusal(group(FoldKind::Max { byte_order: true }), &[collated]), None);
    }
    assert_eq!(refusal(unproven, &[19]), None, "name always is in C order");
    for (kind, oid) in [
        (FoldKind::Sum, 790),
        (FoldKind::Sum, 1186),
        (FoldKind::Sum, 23),
        (FoldKind::Count, NUMERIC),
        (FoldKind::And, INT8),
        (FoldKind::Max { byte_order: true }, 1186),
        (FoldKind::Avg { sum: 0, count: 0 }, NUMERIC),
    ] {
        assert_eq!(refusal(group(kind), &[oid]), Some("0A000"), "{kind:?} {oid}");
    }
    assert_eq!(refusal(average(), &[FLOAT8, 700, INT8]), Some("0A000"));
    assert_eq!(refusal(average(), &[FLOAT8, FLOAT8, INT8]), None);
    let rounded = |spec: MergeSpec, binary: bool| {
        let columns = vec![ResultColumn { type_oid: FLOAT8, type_modifier: -1, binary, rounded: true }];
        Merger::new(spec, columns, 2, ROOMY).err().map(|error| error.sqlstate)
    };
    let ordered = || MergeSpec { order: vec![ascending(0)], ..MergeSpec::default() };
    for spec in [ordered(), group(FoldKind::Sum), MergeSpec { distinct: true, ..MergeSpec::default() }] {
        assert_eq!(rounded(spec.clone(), false), Some("0A000"), "too few digits: {spec:?}");
        assert_eq!(rounded(spec, true), None);
    }
    assert_eq!(rounded(MergeSpec::default(), false), None);
    assert_eq!(refusal(MergeSpec { distinct: true, ..MergeSpec::default() }, &[INT8, 114]), Some("0A000"));
    assert_eq!(refusal(MergeSpec { distinct: true, hidden: 1, ..MergeSpec::default() }, &[INT8, 114]), None);
    assert_eq!(refusal(MergeSpec::default(), &[114]), None, "any type passes through");
}

#[test]
fn a_plan_that_names_missing_columns_is_our_bug() {
    let spec = MergeSpec { order: vec![ascending(1)], ..MergeSpec::default() };
    let error = Merger::new(spec, text_columns(&[INT8]), 1, ROOMY).err().expect("no such column");
    assert_eq!((error.sqlstate, error.blame), ("XX000", Blame::Proxy));
    assert!(Merger::new(MergeSpec { hidden: 2, ..MergeSpec::default() }, text_columns(&[INT8]), 1, ROOMY).is_err());
}

#[test]
fn memory_is_bounded() {
    let tight = MergeLimits { buffered_bytes_max: 2000, groups_max: 10 };
    let group = || MergeSpec {
        group: Some(GroupSpec { keys: vec![0], folds: vec![], ..GroupSpec::default() }),
        ..MergeSpec::default()
    };
    let distinct = || MergeSpec { distinct: true, ..MergeSpec::default() };
    let order = || MergeSpec { order: vec![ascending(0)], ..MergeSpec::default() };
    for (spec, limits) in [
        (group(), tight),
        (distinct(), tight),
        (group(), MergeLimits { groups_max: 1000, ..tight }),
        (distinct(), MergeLimits { groups_max: 1000, ..tight }),
        (order(), tight),
        (MergeSpec::default(), tight),
    ] {
        let mut merger = Merger::new(spec, text_columns(&[INT8]), 2, limits).expect("merger");
        let refused = (0..1000).map(|row| merger.push(0, &body(&cells(&[&row.to_string()])))).find_map(Result::err);
        let error = refused.expect("a thousand rows do not fit");
        assert_eq!(error.sqlstate, "54000");
        assert!(error.hint.is_some());
    }
    // What has gone out does not count.
    for spec in [order(), MergeSpec::default()] {
        let mut merger = Merger::new(spec, text_columns(&[INT8]), 1, tight).expect("merger");
        let mut out = BytesMut::new();
        for row in 0..1000 {
            merger.push(0, &body(&cells(&[&row.to_string()]))).expect("room");
            merger.poll(&mut out).expect("poll");
        }
    }
    // One row may be larger than everything.
    let mut merger = Merger::new(order(), text_columns(&[TEXT]), 1, tight).expect("merger");
    assert_eq!(merger.push(0, &body(&vec![Some(vec![b'x'; 5000])])), Ok(()));
}

#[test]
fn a_satisfied_limit_ends_it_early() {
    let spec = MergeSpec { order: vec![ascending(0)], limit: Some(1), ..MergeSpec::default() };
    let mut merger = Merger::new(spec, text_columns(&[INT8]), 2, ROOMY).expect("merger");
    let mut out = BytesMut::new();
    assert_eq!(merger.wants(), Wants::One(0));
    merger.push(0, &body(&cells(&["5"]))).expect("push");
    assert_eq!((merger.wants(), merger.poll(&mut out)), (Wants::One(1), Ok(0)));
    merger.push(1, &body(&cells(&["3"]))).expect("push");
    assert_eq!((merger.wants(), merger.done()), (Wants::Nothing, false));
    assert_eq!(merger.poll(&mut out), Ok(1));
    assert!(merger.done());
    assert_eq!(merger.push(1, b"ignored, whatever it is"), Ok(()));
    assert_eq!(merger.poll(&mut out), Ok(0));
    assert_eq!(frames(out), [cells(&["3"])]);

    let none = Merger::new(MergeSpec { limit: Some(0), ..MergeSpec::default() }, text_columns(&[INT8]), 2, ROOMY)
        .expect("merger");
    assert!(none.done());
}

#[test]
fn rows_after_the_end_are_refused() {
    let mut merger = Merger::new(MergeSpec::default(), text_columns(&[INT8]), 1, ROOMY).expect("merger");
    merger.finish(0);
    assert!(merger.done());
    assert_eq!(merger.push(0, &body(&cells(&["1"]))).map_err(|error| error.sqlstate), Err("XX000"));
    assert_eq!(merger.push(7, &body(&cells(&["1"]))).map_err(|error| error.sqlstate), Err("XX000"));
}

#[test]
fn hidden_columns_order_and_vanish() {
    let spec = MergeSpec { hidden: 1, order: vec![ascending(1)], ..MergeSpec::default() };
    let sources = [vec![cells(&["b", "2"])], vec![cells(&["a", "10"])]];
    assert_eq!(merge(spec, text_columns(&[TEXT, INT8]), &sources), Ok(vec![cells(&["b"]), cells(&["a"])]));
    let int8 = |value: i64| Some(value.to_be_bytes().to_vec());
    let spec = MergeSpec { hidden: 1, order: vec![ascending(1)], ..MergeSpec::default() };
    let sources = [vec![vec![int8(1), int8(-2)]], vec![vec![int8(2), int8(-3)]]];
    assert_eq!(merge(spec, binary_columns(&[INT8, INT8]), &sources), Ok(vec![vec![int8(2)], vec![int8(1)]]));
}
