//! Every type that can be merged, in its order, in both formats.

use super::*;

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
