//! Aggregates put together from partial ones.

use super::*;

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
        (Sum, FLOAT8, &["1.7e308", "1.7e308", "NaN"], "NaN"),
        (Sum, 700, &["3e38", "3e38", "-Infinity"], "-Infinity"),
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
