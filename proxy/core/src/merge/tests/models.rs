//! Rows, order, groups and averages against a plain model of them, over random rows.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

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
