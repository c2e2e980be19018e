//! The merger against a model: random rows are split over sources, sorted or aggregated there by the model, merged, and
//! must equal the model's answer over the union. Then the types one by one, limits, refusals and the calling order.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use bytes::{Buf, BytesMut};
use proptest::prelude::*;

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

// ---- the model ----

/// Numbers of up to four decimals that often are equal at different scales.
#[derive(Clone, Copy, Debug)]
struct Number {
    unscaled: i64,
    scale: usize,
}

impl Number {
    fn rank(self) -> i128 {
        i128::from(self.unscaled) * 10_i128.pow(4 - self.scale as u32)
    }

    fn text(self) -> Vec<u8> {
        decimal_text(i128::from(self.unscaled), self.scale).into_bytes()
    }
}

fn decimal_text(unscaled: i128, scale: usize) -> String {
    let sign = if unscaled < 0 { "-" } else { "" };
    let unit = 10_i128.pow(scale as u32);
    let (whole, fraction) = (unscaled.abs() / unit, unscaled.abs() % unit);
    if scale == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction:0scale$}") }
}

/// A row of the model: number, text, integer.
#[derive(Clone, Debug)]
struct Model {
    number: Option<Number>,
    text: Option<String>,
    integer: Option<i64>,
}

impl Model {
    fn cells(&self) -> Cells {
        vec![
            self.number.map(Number::text),
            self.text.clone().map(String::into_bytes),
            self.integer.map(|integer| integer.to_string().into_bytes()),
        ]
    }

    fn compare(&self, other: &Model, key: &OrderKey) -> Ordering {
        match key.column {
            0 => compare(self.number.map(Number::rank), other.number.map(Number::rank), key),
            1 => compare(self.text.as_deref().map(str::as_bytes), other.text.as_deref().map(str::as_bytes), key),
            _ => compare(self.integer, other.integer, key),
        }
    }
}

fn compare<T: Ord>(a: Option<T>, b: Option<T>, key: &OrderKey) -> Ordering {
    match (a, b) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) if key.nulls_first => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (Some(_), None) if key.nulls_first => Ordering::Greater,
        (Some(_), None) => Ordering::Less,
        (Some(a), Some(b)) if key.descending => b.cmp(&a),
        (Some(a), Some(b)) => a.cmp(&b),
    }
}

fn number() -> impl Strategy<Value = Number> {
    prop_oneof![
        (-30_i64..30, 0_usize..3)
            .prop_map(|(whole, scale)| Number { unscaled: whole * 10_i64.pow(scale as u32), scale }),
        (-200_000_i64..200_000, 0_usize..=4).prop_map(|(unscaled, scale)| Number { unscaled, scale }),
        (any::<i64>(), 0_usize..=4).prop_map(|(unscaled, scale)| Number { unscaled, scale }),
    ]
}

fn model_row() -> impl Strategy<Value = Model> {
    (prop::option::of(number()), prop::option::of("[a-c\\x00é]{0,3}"), prop::option::of(-9_i64..12))
        .prop_map(|(number, text, integer)| Model { number, text, integer })
}

fn model_sources() -> impl Strategy<Value = Vec<Vec<Model>>> {
    prop::collection::vec(prop::collection::vec(model_row(), 0..12), 1..6)
}

fn order() -> impl Strategy<Value = Vec<OrderKey>> {
    let key = (0_usize..3, any::<bool>(), any::<bool>()).prop_map(|(column, descending, nulls_first)| OrderKey {
        column,
        descending,
        nulls_first,
        byte_order: true,
    });
    prop::collection::vec(key, 1..4)
}

fn sorted(mut rows: Vec<Model>, order: &[OrderKey]) -> Vec<Model> {
    // Stable, so that equal rows keep the order of their sources: the merger's tie rule.
    rows.sort_by(|a, b| order.iter().fold(Ordering::Equal, |ordering, key| ordering.then_with(|| a.compare(b, key))));
    rows
}

fn all_cells(sources: &[Vec<Model>]) -> Vec<Vec<Cells>> {
    sources.iter().map(|rows| rows.iter().map(Model::cells).collect()).collect()
}

proptest! {
    #[test]
    fn sorted_sources_interleave(sources in model_sources(), order in order(), offset in 0_u64..8, limit in prop::option::of(0_u64..20)) {
        let sources: Vec<_> = sources.into_iter().map(|rows| sorted(rows, &order)).collect();
        let expected = window(sorted(sources.concat(), &order), offset, limit);
        let spec = MergeSpec { order, offset, limit, ..MergeSpec::default() };
        let merged = merge(spec, text_columns(&[NUMERIC, TEXT, INT8]), &all_cells(&sources)).expect("merge");
        prop_assert_eq!(merged, expected.iter().map(Model::cells).collect::<Vec<_>>());
    }

    #[test]
    fn unordered_rows_all_arrive(sources in model_sources(), offset in 0_u64..8, limit in prop::option::of(0_u64..20)) {
        let mut union: Vec<_> = all_cells(&sources).concat();
        let expected = window(union.clone(), offset, limit).len();
        let spec = MergeSpec { offset, limit, ..MergeSpec::default() };
        let mut merged = merge(spec, text_columns(&[NUMERIC, TEXT, INT8]), &all_cells(&sources)).expect("merge");
        prop_assert_eq!(merged.len(), expected);
        if offset == 0 && limit.is_none() {
            union.sort();
            merged.sort();
            prop_assert_eq!(merged, union);
        }
    }

    #[test]
    fn distinct_rows_come_once(sources in model_sources(), order in order(), ordered in any::<bool>(), full in any::<bool>()) {
        let mut order = if ordered { order } else { Vec::new() };
        if ordered && full {
            order.extend((0..3).map(ascending));
        }
        let sources: Vec<_> = sources.into_iter().map(|rows| sorted(rows, &order)).collect();
        let identity = |row: &Model| (row.number.map(Number::rank), row.text.clone(), row.integer);
        let mut seen = std::collections::BTreeSet::new();
        let expected: Vec<_> = sorted(sources.concat(), &order).into_iter().filter(|row| seen.insert(identity(row))).collect();
        let spec = MergeSpec { distinct: true, order: order.clone(), ..MergeSpec::default() };
        let mut merged = merge(spec, text_columns(&[NUMERIC, TEXT, INT8]), &all_cells(&sources)).expect("merge");
        if ordered {
            prop_assert_eq!(merged, expected.iter().map(Model::cells).collect::<Vec<_>>());
        } else {
            // Which of two equal numbers is shown is open: compare by value.
            let canonical = |row: &mut Cells| {
                let text = row[0].take().map(|text| String::from_utf8(text).expect("ascii"));
                row[0] = text.map(|text| if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text.into_bytes() });
            };
            let mut expected: Vec<_> = expected.iter().map(Model::cells).collect();
            expected.iter_mut().chain(&mut merged).for_each(canonical);
            expected.sort();
            merged.sort();
            prop_assert_eq!(merged, expected);
        }
    }

    #[test]
    fn partial_groups_fold_to_whole_ones(sources in model_sources(), limit in prop::option::of(0_u64..9), offset in 0_u64..3, descending in any::<bool>()) {
        let partial: Vec<Vec<Cells>> = sources.iter().map(|rows| aggregate(rows).into_values().map(|group| group.cells()).collect()).collect();
        let mut expected: Vec<_> = aggregate(&sources.concat()).into_values().collect();
        // Order by count, then by the key.
        expected.sort_by_key(|group| if descending { -group.count } else { group.count });
        let expected: Vec<Cells> = window(expected, offset, limit).iter().map(Aggregate::cells).collect();
        let folds = [FoldKind::Count, FoldKind::Sum, FoldKind::Sum, FoldKind::Min { byte_order: false }, FoldKind::Max { byte_order: false }, FoldKind::And];
        let folds = folds.into_iter().enumerate().map(|(index, kind)| Fold { column: index + 1, kind }).collect();
        let spec = MergeSpec {
            group: Some(GroupSpec { keys: vec![0], folds, ..GroupSpec::default() }),
            order: vec![OrderKey { descending, ..ascending(1) }, ascending(0)],
            offset,
            limit,
            ..MergeSpec::default()
        };
        let merged = merge(spec, text_columns(&[TEXT, INT8, INT8, NUMERIC, INT8, INT8, BOOL]), &partial).expect("merge");
        prop_assert_eq!(merged, expected);
    }

    #[test]
    fn averages_are_the_nearest_of_their_scale(parts in prop::collection::vec((number(), 1_i64..1000), 1..6)) {
        let sources: Vec<Vec<Cells>> =
            parts.iter().map(|(sum, count)| vec![vec![None, Some(sum.text()), Some(count.to_string().into_bytes())]]).collect();
        let merged = merge(average(), text_columns(&[NUMERIC, NUMERIC, INT8]), &sources).expect("merge");
        let text = String::from_utf8(merged[0][0].clone().expect("not null")).expect("ascii");
        let scale = text.split_once('.').map_or(0, |(_, fraction)| fraction.len());
        let average: num_bigint::BigInt = text.replace('.', "").parse().expect("digits");
        let sum: i128 = parts.iter().map(|(sum, _)| sum.rank()).sum();
        let count: i64 = parts.iter().map(|(_, count)| count).sum();
        // |average - sum/count| <= half a unit of the last place, all times 10^(scale+4) * count.
        let exact = num_bigint::BigInt::from(sum) * num_bigint::BigInt::from(10).pow(scale as u32);
        let error: num_bigint::BigInt = average * count * 10_000 - exact;
        prop_assert!(error.magnitude() * 2_u32 <= num_bigint::BigUint::from(count as u64) * 10_000_u32, "{text}");
        prop_assert_eq!(merged[0].len(), 1, "hidden columns are gone");
    }

    #[test]
    fn both_formats_of_a_number_sort_and_add_alike(numbers in prop::collection::vec(number(), 1..20)) {
        use super::numeric::{Decimal, Numeric};
        for pair in numbers.windows(2) {
            let key = |number: Number, binary: bool| {
                let text = Decimal::from_text(&number.text()).expect("text");
                let sent = Numeric::from(text.clone()).to_binary().expect("fits");
                let decimal = if binary { Decimal::from_binary(&sent).expect("binary") } else { text };
                let mut key = Vec::new();
                decimal.sort_key(&mut key);
                key
            };
            for (a, b) in [(false, false), (false, true), (true, false), (true, true)] {
                prop_assert_eq!(key(pair[0], a).cmp(&key(pair[1], b)), pair[0].rank().cmp(&pair[1].rank()));
            }
        }
        let mut total = Numeric::from(0);
        for number in &numbers {
            total.add(Decimal::from_text(&number.text()).expect("text").into());
        }
        let scale = numbers.iter().map(|number| number.scale).max().unwrap_or(0);
        let expected: i128 = numbers.iter().map(|number| number.rank()).sum::<i128>() / 10_i128.pow(4 - scale as u32);
        prop_assert_eq!(total.to_text(), decimal_text(expected, scale));
    }

    #[test]
    fn any_bytes_are_a_row_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..40), binary in any::<bool>()) {
        for oid in [16, 17, 18, 19, 20, 21, 23, 25, 26, 700, 701, 1042, 1043, 1082, 1083, 1114, 1184, 1700, 2950] {
            let columns = vec![ResultColumn { type_oid: oid, type_modifier: -1, binary, rounded: false }];
            let spec = MergeSpec { order: vec![ascending(0)], ..MergeSpec::default() };
            let mut merger = Merger::new(spec, columns, 1, ROOMY).expect("orderable");
            let _ = merger.push(0, &bytes);
            let _ = merger.push(0, &body(&vec![Some(bytes.clone())]));
        }
    }
}

/// The model's partial or whole group.
struct Aggregate {
    key: Option<String>,
    count: i64,
    sum: Option<i64>,
    numeric: Option<(i128, usize)>,
    min: Option<i64>,
    max: Option<i64>,
    all_positive: Option<bool>,
}

impl Aggregate {
    fn cells(&self) -> Cells {
        let text = |value: Option<String>| value.map(String::into_bytes);
        vec![
            text(self.key.clone()),
            text(Some(self.count.to_string())),
            text(self.sum.map(|sum| sum.to_string())),
            text(self.numeric.map(|(sum, scale)| decimal_text(sum / 10_i128.pow(4 - scale as u32), scale))),
            text(self.min.map(|min| min.to_string())),
            text(self.max.map(|max| max.to_string())),
            text(self.all_positive.map(|all| if all { "t" } else { "f" }.into())),
        ]
    }
}

/// Groups by text, nulls last (the order ties are broken in).
fn aggregate(rows: &[Model]) -> BTreeMap<(bool, Option<String>), Aggregate> {
    let mut groups = BTreeMap::new();
    for row in rows {
        let group = groups.entry((row.text.is_none(), row.text.clone())).or_insert_with(|| Aggregate {
            key: row.text.clone(),
            count: 0,
            sum: None,
            numeric: None,
            min: None,
            max: None,
            all_positive: None,
        });
        group.count += 1;
        if let Some(integer) = row.integer {
            group.sum = Some(group.sum.unwrap_or(0) + integer);
            group.min = Some(group.min.map_or(integer, |min| min.min(integer)));
            group.max = Some(group.max.map_or(integer, |max| max.max(integer)));
            group.all_positive = Some(group.all_positive.unwrap_or(true) && integer > 0);
        }
        if let Some(number) = row.number {
            let (sum, scale) = group.numeric.unwrap_or((0, 0));
            group.numeric = Some((sum + number.rank(), scale.max(number.scale)));
        }
    }
    groups
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

// ---- the types ----

/// A value as text and binary.
type Rung = (&'static str, Vec<u8>);

/// Distinct values of a type in ascending order, as text and binary.
fn ladders() -> Vec<(u32, Vec<Rung>)> {
    let float8 = |text: &'static str| (text, text.parse::<f64>().expect(text).to_be_bytes().to_vec());
    let float4 = |text: &'static str| (text, text.parse::<f32>().expect(text).to_be_bytes().to_vec());
    let micros = |text: &'static str, micros: i64| (text, micros.to_be_bytes().to_vec());
    let days = |text: &'static str, days: i32| (text, days.to_be_bytes().to_vec());
    let plain = |text: &'static str| (text, text.as_bytes().to_vec());
    let floats = ["-Infinity", "-1e+20", "-1.5", "-1e-20", "0", "1e-20", "2", "10", "Infinity", "NaN"];
    vec![
        (16, vec![("f", vec![0]), ("t", vec![1])]),
        (
            17,
            vec![
                ("\\x", vec![]),
                ("\\x00", vec![0]),
                ("\\x0000", vec![0, 0]),
                ("\\x0001", vec![0, 1]),
                ("\\x01", vec![1]),
                ("\\xff", vec![255]),
            ],
        ),
        (18, vec![("", vec![0]), ("A", vec![65]), ("\\377", vec![255])]),
        (19, vec![plain("A"), plain("a"), plain("aa")]),
        (
            20,
            ["-9223372036854775808", "-1", "0", "9", "10", "9223372036854775807"]
                .map(|text| (text, text.parse::<i64>().expect(text).to_be_bytes().to_vec()))
                .to_vec(),
        ),
        (
            21,
            ["-32768", "-1", "0", "9", "10"]
                .map(|text| (text, text.parse::<i16>().expect(text).to_be_bytes().to_vec()))
                .to_vec(),
        ),
        (
            23,
            ["-2147483648", "-1", "0", "9", "10"]
                .map(|text| (text, text.parse::<i32>().expect(text).to_be_bytes().to_vec()))
                .to_vec(),
        ),
        (
            26,
            ["0", "9", "10", "4294967295"]
                .map(|text| (text, text.parse::<u32>().expect(text).to_be_bytes().to_vec()))
                .to_vec(),
        ),
        (25, vec![plain(""), plain(" "), plain("Z"), plain("a"), plain("a "), plain("aa"), plain("é")]),
        (1043, vec![plain(""), plain("a"), plain("b")]),
        (1042, vec![plain("  "), plain("Z "), plain("a   "), plain("aa")]),
        (700, floats.map(float4).to_vec()),
        (701, floats.map(float8).to_vec()),
        (
            1082,
            vec![
                days("-infinity", i32::MIN),
                days("0044-03-15 BC", -746_448),
                days("1999-12-31", -1),
                days("2000-01-01", 0),
                days("10000-01-01", 2_921_940),
                days("infinity", i32::MAX),
            ],
        ),
        (1083, vec![micros("00:00:00", 0), micros("00:00:00.5", 500_000), micros("24:00:00", 86_400_000_000)]),
        (
            1114,
            vec![
                micros("-infinity", i64::MIN),
                micros("1999-12-31 23:59:59.999999", -1),
                micros("2000-01-01 00:00:00", 0),
                micros("infinity", i64::MAX),
            ],
        ),
        (
            1184,
            vec![
                micros("-infinity", i64::MIN),
                micros("2000-01-01 05:00:00+05:30", -1_800_000_000),
                micros("1999-12-31 20:00:00-04", 0),
                micros("infinity", i64::MAX),
            ],
        ),
        (
            1700,
            vec![
                ("-Infinity", vec![0, 0, 0, 0, 0xF0, 0, 0, 0]),
                ("-1.5", vec![0, 2, 0, 0, 0x40, 0, 0, 1, 0, 1, 0x13, 0x88]),
                ("0", vec![0; 8]),
                ("10000", vec![0, 1, 0, 1, 0, 0, 0, 0, 0, 1]),
                ("Infinity", vec![0, 0, 0, 0, 0xD0, 0, 0, 0]),
                ("NaN", vec![0, 0, 0, 0, 0xC0, 0, 0, 0]),
            ],
        ),
        (
            2950,
            vec![
                ("00000000-0000-0000-0000-000000000001", {
                    let mut uuid = vec![0; 16];
                    uuid[15] = 1;
                    uuid
                }),
                ("ff000000-0000-0000-0000-000000000000", {
                    let mut uuid = vec![0; 16];
                    uuid[0] = 255;
                    uuid
                }),
            ],
        ),
    ]
}

#[test]
fn every_type_sorts_in_both_formats_and_directions() {
    for (oid, ladder) in ladders() {
        for binary in [false, true] {
            for descending in [false, true] {
                let mut values: Vec<Cells> = ladder
                    .iter()
                    .map(|(text, sent)| vec![Some(if binary { sent.clone() } else { text.as_bytes().to_vec() })])
                    .collect();
                if descending {
                    values.reverse();
                }
                // One value per source, dealt backwards.
                let sources: Vec<Vec<Cells>> = values.iter().rev().map(|value| vec![value.clone()]).collect();
                let columns = vec![ResultColumn { type_oid: oid, type_modifier: -1, binary, rounded: false }];
                let spec = MergeSpec { order: vec![OrderKey { descending, ..ascending(0) }], ..MergeSpec::default() };
                assert_eq!(
                    merge(spec, columns.clone(), &sources).expect("merge"),
                    values,
                    "{oid} binary {binary} descending {descending}"
                );
                // All are distinct, and each equals itself.
                let twice: Vec<Vec<Cells>> = sources.iter().chain(&sources).cloned().collect();
                let spec = MergeSpec { distinct: true, ..MergeSpec::default() };
                assert_eq!(merge(spec, columns, &twice).expect("merge").len(), values.len(), "{oid}");
            }
        }
    }
}

#[test]
fn values_that_look_different_may_be_equal() {
    for (oid, a, b) in [
        (NUMERIC, "1.0", "1.00"),
        (NUMERIC, "0", "0.00"),
        (FLOAT8, "-0", "0"),
        (700, "-0", "0"),
        (1042, "a ", "a"),
        (1184, "2000-01-01 00:00:00+00", "2000-01-01 01:00:00+01"),
        (17, "\\x5c41", "\\\\A"),
        (17, "\\x00ff", "\\000\\377"),
        (18, "A", "\\101"),
    ] {
        let group = Some(GroupSpec { keys: vec![0], folds: vec![], ..GroupSpec::default() });
        let spec = MergeSpec { group, ..MergeSpec::default() };
        let merged = merge(spec, text_columns(&[oid]), &[vec![cells(&[a])], vec![cells(&[b])]]).expect("merge");
        assert_eq!(merged, [cells(&[a])], "the lowest source's is shown, though the highest came first");
    }
}

#[test]
fn dates_in_other_styles_are_refused() {
    let spec = MergeSpec { order: vec![ascending(0)], ..MergeSpec::default() };
    let error = merge(spec, text_columns(&[1082]), &[vec![cells(&["01/02/2024"])]]).expect_err("ambiguous");
    assert_eq!(error.sqlstate, "0A000");
    assert!(error.hint.is_some_and(|hint| hint.contains("DateStyle")));
}

// ---- aggregates ----

fn fold_one(kind: FoldKind, oid: u32, binary: bool, parts: &[Option<Vec<u8>>]) -> Result<Option<Vec<u8>>, UserError> {
    let spec = MergeSpec {
        group: Some(GroupSpec { keys: vec![], folds: vec![Fold { column: 0, kind }], ..GroupSpec::default() }),
        ..MergeSpec::default()
    };
    let columns = vec![ResultColumn { type_oid: oid, type_modifier: -1, binary, rounded: false }];
    let sources: Vec<Vec<Cells>> = parts.iter().map(|part| vec![vec![part.clone()]]).collect();
    let mut rows = merge(spec, columns, &sources)?;
    assert_eq!(rows.len(), 1);
    Ok(rows.remove(0).remove(0))
}

fn fold_text(kind: FoldKind, oid: u32, parts: &[&str]) -> Result<String, UserError> {
    let parts: Vec<_> = parts.iter().map(|part| (*part != "null").then(|| part.as_bytes().to_vec())).collect();
    let folded = fold_one(kind, oid, false, &parts)?;
    Ok(folded.map_or("null".into(), |text| String::from_utf8(text).expect("text")))
}

#[test]
fn folds_answer_as_postgres_does() {
    use FoldKind::*;
    for (kind, oid, parts, expected) in [
        (Count, INT8, &["1", "2", "0"][..], "3"),
        (Sum, INT8, &["null", "2", "-5"], "-3"),
        (Sum, INT8, &["null", "null"], "null"),
        (Sum, INT8, &["9223372036854775807", "1", "-1"], "9223372036854775807"),
        (Sum, NUMERIC, &["1.5", "null", "2.250"], "3.750"),
        (Sum, NUMERIC, &["Infinity", "-Infinity"], "NaN"),
        (Sum, FLOAT8, &["0.1", "null", "0.2"], "0.30000000000000004"),
        (Sum, FLOAT8, &["-0", "-0"], "-0"),
        (Sum, FLOAT8, &["Infinity", "-Infinity"], "NaN"),
        (Sum, FLOAT8, &["null", "null"], "null"),
        (Sum, 700, &["16777216", "1"], "1.6777216e+07"),
        (Min { byte_order: false }, NUMERIC, &["2", "null", "-1.50"], "-1.50"),
        (Max { byte_order: false }, NUMERIC, &["2", "NaN", "Infinity"], "NaN"),
        (Max { byte_order: false }, NUMERIC, &["2.0", "2.00"], "2.0"),
        (
            Min { byte_order: false },
            1184,
            &["2000-01-01 00:00:00+00", "2000-01-01 00:30:00+01"],
            "2000-01-01 00:30:00+01",
        ),
        (Max { byte_order: false }, 1082, &["null", "null"], "null"),
        (And, BOOL, &["t", "null", "f"], "f"),
        (And, BOOL, &["t", "null"], "t"),
        (Or, BOOL, &["f", "t"], "t"),
        (Or, BOOL, &["null"], "null"),
    ] {
        assert_eq!(fold_text(kind, oid, parts).as_deref(), Ok(expected), "{kind:?} {parts:?}");
    }
    for (kind, oid, parts, message) in [
        (Count, INT8, &["9223372036854775807", "1"][..], "bigint out of range"),
        (Sum, INT8, &["-9223372036854775808", "-1"], "bigint out of range"),
        (Sum, FLOAT8, &["1.7e308", "1.7e308"], "value out of range: overflow"),
    ] {
        let error = fold_text(kind, oid, parts).expect_err("overflow");
        assert_eq!((error.sqlstate, &*error.message), ("22003", message));
    }
}

#[test]
fn binary_folds_are_binary() {
    let int8 = |value: i64| Some(value.to_be_bytes().to_vec());
    assert_eq!(fold_one(FoldKind::Sum, INT8, true, &[int8(2), int8(-5), None]), Ok(int8(-3)));
    // 9999.5 + 0.50 = 10000.00: one group of weight 1 and display scale 2.
    let left = vec![0, 2, 0, 0, 0, 0, 0, 1, 0x27, 0x0F, 0x13, 0x88];
    let right = vec![0, 1, 0xff, 0xff, 0, 0, 0, 2, 0x13, 0x88];
    assert_eq!(
        fold_one(FoldKind::Sum, NUMERIC, true, &[Some(left), Some(right)]),
        Ok(Some(vec![0, 1, 0, 1, 0, 0, 0, 2, 0, 1]))
    );
    assert_eq!(fold_one(FoldKind::Or, BOOL, true, &[Some(vec![0]), Some(vec![1])]), Ok(Some(vec![1])));
}

#[test]
fn averages_are_recomposed() {
    let of = |oids: &[u32], rows: &[[&str; 3]]| {
        let sources: Vec<Vec<Cells>> = rows.iter().map(|row| vec![cells(row)]).collect();
        let rows = merge(average(), text_columns(oids), &sources).expect("merge");
        rows[0][0].clone().map_or("null".into(), |text| String::from_utf8(text).expect("text"))
    };
    let integers = [NUMERIC, INT8, INT8];
    assert_eq!(of(&integers, &[["7", "7", "1"], ["1", "3", "3"]]), "2.5000000000000000");
    assert_eq!(of(&integers, &[["null", "null", "0"], ["null", "null", "0"]]), "null");
    let floats = [FLOAT8, FLOAT8, INT8];
    assert_eq!(of(&floats, &[["7", "7", "1"], ["1", "3", "3"]]), "2.5");
    assert_eq!(of(&floats, &[["null", "null", "0"], ["1", "1", "3"]]), "0.3333333333333333");
    assert_eq!(of(&[NUMERIC, NUMERIC, INT8], &[["1", "1.00", "1"], ["1", "1.0", "2"]]), "0.66666666666666666667");
}

#[test]
fn an_aggregate_over_nothing_is_one_row() {
    let fold = |column, kind| Fold { column, kind };
    let folds = vec![fold(0, FoldKind::Count), fold(1, FoldKind::Sum)];
    let spec =
        MergeSpec { group: Some(GroupSpec { keys: vec![], folds, ..GroupSpec::default() }), ..MergeSpec::default() };
    let columns = text_columns(&[INT8, NUMERIC]);
    assert_eq!(
        merge(spec.clone(), columns.clone(), &[vec![cells(&["0", "null"])], vec![cells(&["0", "null"])]]),
        Ok(vec![cells(&["0", "null"])])
    );
    assert_eq!(merge(spec.clone(), columns.clone(), &[vec![], vec![]]), Ok(vec![cells(&["0", "null"])]));
    assert_eq!(merge(MergeSpec { offset: 1, ..spec }, columns, &[vec![cells(&["1", "1"])]]), Ok(vec![]));
}

#[test]
fn text_in_byte_order_has_a_smallest_and_a_largest() {
    let folds = [FoldKind::Min { byte_order: true }, FoldKind::Max { byte_order: true }];
    let folds = folds.into_iter().enumerate().map(|(column, kind)| Fold { column, kind }).collect();
    let spec =
        MergeSpec { group: Some(GroupSpec { keys: vec![], folds, ..GroupSpec::default() }), ..MergeSpec::default() };
    let sources =
        [vec![cells(&["b", "b"])], vec![cells(&["null", "null"])], vec![cells(&["Z", "é"])], vec![cells(&["ab", "z"])]];
    assert_eq!(merge(spec, text_columns(&[25, 1043]), &sources), Ok(vec![cells(&["Z", "é"])]));
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
