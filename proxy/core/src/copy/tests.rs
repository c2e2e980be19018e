//! Splitting and joining COPY data, against small inputs by hand and any input in any chunks.

use std::sync::Arc;

use proptest::prelude::*;

use super::{Format, Joiner, Layout, Options, Splitter, context_with_line};
use crate::error::UserError;
use crate::id::ShardId;
use crate::sql::lex::lex;
use crate::topology::{Key, KeyType, SlotMap};

const PARTS: [ShardId; 3] = [ShardId(0), ShardId(1), ShardId(2)];

fn slots() -> SlotMap {
    SlotMap::new((0..4096).map(|slot| ShardId(slot % 3)).collect()).expect("an owner per slot")
}

fn options(sql: &str) -> Options {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).expect("a statement");
    Options::read(sql, &tokens).unwrap_or_else(|word| panic!("{sql}: {word}"))
}

fn layout(with: &str, position: usize, key_type: KeyType) -> Arc<Layout> {
    let options = options(&format!("COPY t FROM STDIN {with}"));
    Arc::new(Layout { table: "t".into(), column: "k".into(), key_type, varchar: false, position, options })
}

fn part_of(key: &Key<'_>) -> usize {
    usize::from(slots().owner(key.slot()).0)
}

/// Everything that is handed out, in order, and the error at the end.
type Split = (Vec<(usize, Vec<u8>)>, Option<UserError>);

fn split(layout: &Arc<Layout>, input: &[u8], cuts: &[usize]) -> Split {
    let mut splitter = Splitter::new(Arc::clone(layout), &PARTS, &slots(), 1 << 20);
    let mut given: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut sink = |part: usize, row: &[u8]| given.push((part, row.to_vec()));
    let mut start = 0;
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(input.len());
    let mut error = None;
    for cut in cuts {
        error = splitter.push(&input[start..cut], &mut sink).err();
        start = cut;
        if error.is_some() {
            break;
        }
    }
    let error = error.or_else(|| splitter.finish(&mut sink).err());
    (given, error)
}

/// What each part gets, as one stream.
fn streams(given: &[(usize, Vec<u8>)]) -> [Vec<u8>; 3] {
    let mut streams = [Vec::new(), Vec::new(), Vec::new()];
    for (part, row) in given {
        streams[*part].extend_from_slice(row);
    }
    streams
}

fn rows(given: &[(usize, Vec<u8>)]) -> Vec<(usize, String)> {
    given.iter().map(|(part, row)| (*part, String::from_utf8_lossy(row).into_owned())).collect()
}

fn assert_rows(with: &str, position: usize, input: &str, keys: &[(&str, Key<'_>)]) {
    let key_type = if matches!(keys[0].1, Key::Int(_)) { KeyType::Int } else { KeyType::Text };
    let layout = layout(with, position, key_type);
    let expected: Vec<(usize, String)> = keys.iter().map(|(row, key)| (part_of(key), (*row).to_owned())).collect();
    for step in 1..=input.len() {
        let cuts: Vec<usize> = (0..input.len()).step_by(step).collect();
        let (given, error) = split(&layout, input.as_bytes(), &cuts);
        assert_eq!(error, None, "{input:?}");
        assert_eq!(rows(&given), expected, "{with} {input:?} in pieces of {step}");
    }
}

fn text(value: &str) -> Key<'_> {
    Key::Text(value.as_bytes().into())
}

#[test]
fn text_rows_go_where_their_key_belongs() {
    assert_rows("", 0, "1\ta\n2\tb\n3", &[("1\ta\n", Key::Int(1)), ("2\tb\n", Key::Int(2)), ("3", Key::Int(3))]);
    assert_rows("", 1, "a\t1\r\nb\t 2\r\n", &[("a\t1\r\n", Key::Int(1)), ("b\t 2\r\n", Key::Int(2))]);
    assert_rows("", 0, "7\r8\r", &[("7\r", Key::Int(7)), ("8\r", Key::Int(8))]);
    assert_rows("(delimiter '|', null 'x')", 1, "x|9|\\|\n", &[("x|9|\\|\n", Key::Int(9))]);
    // A backslash makes a line end, a delimiter and any letter data.
    let odd = "a\\\n\\\tb\tk\\x41\\n\\101\\q\n";
    assert_rows("", 1, odd, &[(odd, text("kA\nAq"))]);
    assert_rows("", 0, "\\\\N\n\n", &[("\\\\N\n", text("\\N")), ("\n", text(""))]);
}

#[test]
fn csv_rows_go_where_their_key_belongs() {
    let csv = "(format csv)";
    let (first, second) = ("a,\"k,\"\"1\"\"\n\",x\n", "\"\",\"\",\n");
    assert_rows(csv, 1, &format!("{first}{second}"), &[(first, text("k,\"1\"\n")), (second, text(""))]);
    let (first, second) = ("1,\"a\r\nb\"\r\n", "2,\r\n");
    assert_rows(csv, 0, &format!("{first}{second}"), &[(first, Key::Int(1)), (second, Key::Int(2))]);
    let odd = "'a!'!!!b'z,'!''\n";
    assert_rows("(format csv, quote '''', escape '!')", 0, odd, &[(odd, text("a'!!bz"))]);
    assert_rows("(format csv, force_not_null (k))", 0, ",1\n", &[(",1\n", text(""))]);
    let (first, second) = ("|5|;\"\n", "6;,\n");
    let old = "csv delimiter ';' quote as '|'";
    assert_rows(old, 0, &format!("{first}{second}"), &[(first, Key::Int(5)), (second, Key::Int(6))]);
}

#[test]
fn headers_and_end_markers_are_for_everybody() {
    for (with, input) in [("(header)", "k\n1\n\\.\nrest"), ("(format csv, header match)", "k\n1\n")] {
        let (given, error) = split(&layout(with, 0, KeyType::Int), input.as_bytes(), &[3, 5]);
        assert_eq!(error, None);
        let own = part_of(&Key::Int(1));
        for (part, stream) in streams(&given).iter().enumerate() {
            let end = if input.contains('\\') { "\\.\n" } else { "" };
            let expected = format!("k\n{}{end}", if part == own { "1\n" } else { "" });
            assert_eq!(String::from_utf8_lossy(stream), expected);
        }
    }
}

#[test]
fn a_row_that_cannot_be_placed_ends_it() {
    let cases: [(&str, usize, KeyType, &str, &str, usize); 14] = [
        ("", 0, KeyType::Int, "1\n\\N\n3\n", "0A000", 2),
        ("", 0, KeyType::Int, "1\nx\n", "0A000", 2),
        ("", 1, KeyType::Int, "1\t2\n1\n", "22P04", 2),
        ("", 0, KeyType::Int, "1\n1\\.\n", "22P04", 2),
        ("", 0, KeyType::Int, "1\n2\r\n3\n", "22P04", 2),
        ("", 0, KeyType::Int, "1\r\n2\n", "22P04", 2),
        ("", 0, KeyType::Int, "1\r2\n", "22P04", 2),
        ("(format csv)", 0, KeyType::Int, "1\n,2\n", "0A000", 2),
        ("(format csv)", 0, KeyType::Text, "1\n\\.\n", "22P04", 2),
        ("(format csv)", 0, KeyType::Int, "1\n2,\"a\n", "22P04", 3),
        ("(format csv, force_null *, null 'n')", 0, KeyType::Text, "m\n\"n\"\n", "0A000", 2),
        ("(default '\\D')", 0, KeyType::Text, "m\n\\D\n", "0A000", 2),
        ("", 0, KeyType::Uuid, "00000000-0000-0000-0000-000000000000\nzz\n", "0A000", 2),
        ("(format csv)", 0, KeyType::Int, "\"1\",\"\n\"\n2,\"\n\"\nx\n", "0A000", 4),
    ];
    for (with, position, key_type, input, sqlstate, line) in cases {
        let (given, error) = split(&layout(with, position, key_type), input.as_bytes(), &[]);
        let error = error.unwrap_or_else(|| panic!("{with} {input:?} was taken"));
        assert_eq!(error.sqlstate, sqlstate, "{input:?}: {error}");
        let detail = error.detail.unwrap_or_default();
        assert!(detail.starts_with(&format!("COPY t, line {line}.")), "{input:?}: {detail}");
        let judged = given.last().is_some_and(|(part, _)| *part == 0);
        assert!(judged || error.message.contains("found in data"), "{input:?}: part 0 has seen it");
    }
}

#[test]
fn a_key_that_a_varchar_would_cut_is_refused() {
    let text = layout("", 0, KeyType::Text);
    let varchar = Arc::new(Layout { varchar: true, ..(*text).clone() });
    assert!(split(&text, b"a\nb \n", &[]).1.is_none());
    let error = split(&varchar, b"a\nb \n", &[]).1.expect("refused");
    assert!(error.message.contains("end in blanks"), "{error}");
}

fn binary(rows: &[(i64, Option<&[u8]>)], trailer: bool) -> Vec<u8> {
    let mut bytes = b"PGCOPY\n\xff\r\n\0".to_vec();
    bytes.extend([0; 8]);
    for (key, value) in rows {
        bytes.extend(2_i16.to_be_bytes());
        match value {
            None => bytes.extend((-1_i32).to_be_bytes()),
            Some(value) => {
                bytes.extend((value.len() as i32).to_be_bytes());
                bytes.extend_from_slice(value);
            }
        }
        bytes.extend(8_i32.to_be_bytes());
        bytes.extend(key.to_be_bytes());
    }
    if trailer {
        bytes.extend([0xff; 2]);
    }
    bytes
}

#[test]
fn what_the_shards_send_is_joined_with_one_header_and_one_trailer() {
    let (empty, one, end) = (binary(&[], true), binary(&[(1, None)], false), vec![0xff; 2]);
    let cases = [
        (vec![vec![&empty], vec![&empty], vec![&empty]], binary(&[], true)),
        (vec![vec![&one, &end], vec![&empty], vec![&one, &end]], binary(&[(1, None), (1, None)], true)),
        (vec![vec![&empty], vec![&one, &end], vec![&empty]], binary(&[(1, None)], true)),
    ];
    for (case, expected) in cases {
        let mut joiner = Joiner::new(&options("COPY t TO STDOUT BINARY"), case.len());
        let mut joined = Vec::new();
        for part in &case {
            for body in part {
                joined.extend_from_slice(&body[joiner.message(body)]);
            }
            joiner.next_part();
        }
        assert_eq!(joined, expected);
    }
    let mut joiner = Joiner::new(&options("COPY t TO STDOUT (HEADER)"), 2);
    assert_eq!([joiner.message(b"k\n"), joiner.message(b"1\n")], [0..2, 0..2]);
    joiner.next_part();
    assert_eq!([joiner.message(b"k\n"), joiner.message(b"1\n")], [0..0, 0..2]);
}

#[test]
fn options_are_read_in_both_spellings() {
    let read = |with: &str| options(&format!("COPY s.t (a, \"B\") FROM STDIN {with}"));
    assert_eq!(read("").columns, Some(vec!["a".into(), "B".into()]));
    let new = read(
        "WITH (FORMAT 'csv', DELIMITER E'\\t', QUOTE '|', ESCAPE '!', NULL 'nil', HEADER true, FORCE_NULL (a), \
         FORCE_NOT_NULL *, ENCODING 'utf-8', FREEZE) WHERE a > 1",
    );
    let old = read("WITH DELIMITER AS E'\\t' NULL 'nil' CSV HEADER QUOTE '|' ESCAPE AS '!' FORCE NOT NULL a");
    for options in [&new, &old] {
        assert_eq!(
            (options.format, options.delimiter, options.quote, options.escape),
            (Format::Csv, b'\t', b'|', b'!')
        );
        assert!(options.header && options.force_not_null.contain("a"));
        assert_eq!(&*options.null, b"nil");
    }
    assert!(new.force_null.contain("a") && !new.force_null.contain("b"));
    assert_eq!((new.filter.is_some(), old.filter), (true, None));
    for refused in ["(FORMAT arrow)", "(ON_ERROR ignore)", "(NOVEL)", "(DELIMITER '||')", "WITH NOVEL"] {
        let sql = format!("COPY t FROM STDIN {refused}");
        let mut tokens = Vec::new();
        lex(&sql, &mut tokens).expect("tokens");
        assert!(Options::read(&sql, &tokens).is_err(), "{refused}");
    }
}

#[test]
fn lines_are_the_clients() {
    let layout = layout("(format csv, header)", 0, KeyType::Int);
    let mut splitter = Splitter::new(Arc::clone(&layout), &PARTS, &slots(), 1 << 20);
    let mut own = [1_u64; 3];
    let mut expected = Vec::new();
    splitter.push(b"k\n", &mut |_, _| {}).expect("a header");
    let mut line = 1;
    for key in 0..50_i64 {
        let part = part_of(&Key::Int(key));
        splitter.push(format!("{key},\"\n\"\n").as_bytes(), &mut |_, _| {}).expect("a row");
        line += 2;
        own[part] += 2;
        expected.push((part, own[part], line));
    }
    for (part, own, line) in expected {
        assert_eq!(splitter.client_line(part, own), Some(line));
    }
    assert_eq!(splitter.client_line(0, own[0] + 1), Some(line + 1));
    // A part that begins with a row of several lines does not know yet which line ends count inside quotes.
    let csv = self::layout("csv", 0, KeyType::Int);
    let mut splitter = Splitter::new(csv, &PARTS, &slots(), 1 << 20);
    let key = |part| (0..100).find(|key| part_of(&Key::Int(*key)) == part).expect("a key");
    for row in [format!("{}\n", key(0)), format!("{},\"\n\n\"\n", key(1)), format!("{}\n", key(1))] {
        splitter.push(row.as_bytes(), &mut |_, _| {}).expect("a row");
    }
    assert_eq!([1, 2].map(|own| splitter.client_line(1, own)), [Some(4), Some(5)]);
    let context = "SQL function \"f\"\nCOPY t, Zeile 7, column k: \"COPY t, line 7\"";
    assert_eq!(
        context_with_line(context, "t", |own| Some(own + 1000)),
        Some(("SQL function \"f\"\nCOPY t, Zeile 1007, column k: \"COPY t, line 7\"".to_owned(), 1007))
    );
    assert_eq!(context_with_line("COPY u, line 7", "t", Some), None);
}

proptest! {
    /// However the data is cut, the parts are the same, and together they are the data.
    #[test]
    fn any_chunks_give_the_same(
        input in prop::collection::vec(prop::sample::select(b"0123456789\t\n\n\t,\"\\.\r ab".to_vec()), 0..200),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
        which in 0_usize..4,
        position in 0_usize..3,
    ) {
        let (with, key_type) = [
            ("", KeyType::Text), ("", KeyType::Int), ("(format csv)", KeyType::Text),
            ("(format csv, escape '\\')", KeyType::Text),
        ][which];
        let layout = layout(with, position, key_type);
        let (whole, error) = split(&layout, &input, &[]);
        let (pieces, error_of_pieces) = split(&layout, &input, &cuts);
        prop_assert_eq!(&error, &error_of_pieces);
        if error.is_none() {
            prop_assert_eq!(&whole, &pieces);
            let marked = pieces.iter().any(|(_, row)| row.starts_with(b"\\."));
            let together: Vec<u8> = pieces.iter().flat_map(|(_, row)| row.clone()).collect();
            prop_assert!(marked || together == input);
        } else {
            // A row whose end is wrong is handed on as far as it has come.
            let all = whole.len().min(pieces.len()).saturating_sub(1);
            prop_assert_eq!(&whole[..all], &pieces[..all]);
        }
    }

    #[test]
    fn any_chunks_of_binary_give_the_same(
        rows in prop::collection::vec(
            (any::<i64>(), prop::option::of(prop::collection::vec(any::<u8>(), 0..20))), 0..20),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
        trailer in any::<bool>(),
        cut_off in 0_usize..12,
    ) {
        let rows: Vec<(i64, Option<&[u8]>)> = rows.iter().map(|(key, value)| (*key, value.as_deref())).collect();
        let mut input = binary(&rows, trailer);
        input.truncate(input.len() - cut_off);
        let layout = layout("(format binary)", 1, KeyType::Int);
        let (whole, error) = split(&layout, &input, &[]);
        let (pieces, error_of_pieces) = split(&layout, &input, &cuts);
        prop_assert_eq!(error.is_some(), error_of_pieces.is_some());
        prop_assert_eq!(streams(&whole), streams(&pieces));
        if cut_off == 0 {
            prop_assert!(error.is_none());
            let expected: Vec<usize> = rows.iter().map(|(key, _)| part_of(&Key::Int(*key))).collect();
            let placed = whole.iter().filter(|(_, row)| row.len() > 2 && !row.starts_with(b"PGCOPY"));
            prop_assert_eq!(placed.map(|(part, _)| *part).collect::<Vec<_>>(), expected);
        }
    }
}
