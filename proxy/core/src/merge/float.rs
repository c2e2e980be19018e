//! Floating-point numbers: added as Postgres adds them, and written as Postgres writes them.
//!
//! Invariants: sums of parts follow float8pl, float4pl and float8_combine (src/backend/utils/adt/float.c), so that infinities, NaN
//! and overflow come out as there; text has the digits of double_to_shortest_decimal_buf (src/common/d2s.c), which is what
//! float8out prints as long as extra_float_digits is above 0. Non-goal: fewer digits.

use crate::error::{Blame, UserError};

/// numeric_value_out_of_range.
const OUT_OF_RANGE: &str = "22003";
/// More digits than any double needs.
const DIGITS_MAX: usize = 17;

/// Parts in their order, but infinities and NaN first: behind them nothing overflows, so that no error takes the place of an answer.
fn in_order(parts: &[(f64, i128)]) -> impl Iterator<Item = (f64, i128)> {
    let of = |finite: bool| parts.iter().copied().filter(move |part| part.0.is_finite() == finite);
    of(false).chain(of(true))
}

/// The sum of parts; `None` of none.
pub(super) fn sum8(parts: &[(f64, i128)]) -> Result<Option<f64>, UserError> {
    let mut parts = in_order(parts).map(|part| part.0);
    let Some(first) = parts.next() else { return Ok(None) };
    parts.try_fold(first, plus8).map(Some)
}

/// The same of parts that are single precision.
pub(super) fn sum4(parts: &[(f64, i128)]) -> Result<Option<f32>, UserError> {
    let mut parts = in_order(parts).map(|part| part.0 as f32);
    let Some(first) = parts.next() else { return Ok(None) };
    let plus = |left: f32, right: f32| {
        let sum = left + right;
        if sum.is_infinite() && !left.is_infinite() && !right.is_infinite() { Err(overflow()) } else { Ok(sum) }
    };
    parts.try_fold(first, plus).map(Some)
}

/// The average of rows of which each part has a sum and how many there were. Like Postgres it fails where the squares, of which it
/// has no use, overflow.
pub(super) fn average(parts: &[(f64, i128)]) -> Result<Option<f64>, UserError> {
    let mut whole: Option<(f64, f64)> = None;
    for (sum, count) in in_order(parts).filter(|part| part.1 > 0) {
        let count = count as f64;
        whole = Some(match whole {
            None => (sum, count),
            Some((before, rows)) => {
                let both = plus8(before, sum)?;
                let apart = before / rows - sum / count;
                let squares = rows * count * apart * apart / (rows + count);
                if squares.is_infinite() && before.is_finite() && sum.is_finite() {
                    return Err(overflow());
                }
                (both, rows + count)
            }
        });
    }
    Ok(whole.map(|(sum, count)| sum / count))
}

fn plus8(left: f64, right: f64) -> Result<f64, UserError> {
    let sum = left + right;
    if sum.is_infinite() && !left.is_infinite() && !right.is_infinite() { Err(overflow()) } else { Ok(sum) }
}

fn overflow() -> UserError {
    UserError::new(Blame::Client, OUT_OF_RANGE, "value out of range: overflow")
}

pub(super) fn write8(value: f64, binary: bool) -> Vec<u8> {
    if binary {
        return value.to_be_bytes().to_vec();
    }
    let same = |text: &str| text.parse() == Ok(value.abs());
    let shortest = format!("{:e}", value.abs());
    text(value, &shortest, |digits| format!("{:.*e}", digits - 1, value.abs()), same, 15)
}

pub(super) fn write4(value: f32, binary: bool) -> Vec<u8> {
    if binary {
        return value.to_be_bytes().to_vec();
    }
    let same = |text: &str| text.parse() == Ok(value.abs());
    let shortest = format!("{:e}", value.abs());
    text(value.into(), &shortest, |digits| format!("{:.*e}", digits - 1, value.abs()), same, 6)
}

/// `shortest`: as Rust writes it, `d.ddde-7`. `exponents`: from this exponent on Postgres writes one too.
fn text(
    value: f64,
    shortest: &str,
    with_digits: impl Fn(usize) -> String,
    same: impl Fn(&str) -> bool,
    exponents: i32,
) -> Vec<u8> {
    if value.is_nan() {
        return b"NaN".to_vec();
    }
    let sign = if value.is_sign_negative() { "-" } else { "" };
    if value.is_infinite() {
        return format!("{sign}Infinity").into_bytes();
    }
    if value == 0.0 {
        return format!("{sign}0").into_bytes();
    }
    let mut count = digits_of(shortest).0.len();
    // Of two decimals that are equally near Postgres takes the even one, as formatting with a number of digits does.
    let even = with_digits(count);
    let mut written = if same(&even) && inside(&even, &same) { even } else { shortest.to_owned() };
    // Postgres does not take a decimal that lies just between two numbers, though it would be read back as this one.
    while count < DIGITS_MAX && !inside(&written, &same) {
        count += 1;
        written = with_digits(count);
    }
    let (digits, exponent) = digits_of(&written);
    format!("{sign}{}", laid_out(digits.trim_end_matches('0'), exponent, exponents)).into_bytes()
}

/// `1.25e-7` as `125` and -7.
fn digits_of(written: &str) -> (String, i32) {
    let (mantissa, exponent) = written.split_once('e').unwrap_or((written, "0"));
    (mantissa.replace('.', ""), exponent.parse().unwrap_or(0))
}

/// Is the number read back from either side of that decimal too?
fn inside(written: &str, same: impl Fn(&str) -> bool) -> bool {
    let (digits, exponent) = digits_of(written);
    let scale = exponent - (digits.len() as i32 - 1);
    // The digits fit: there are at most 17 of them.
    let Ok(whole) = digits.parse::<u64>() else { return true };
    let tail = "0".repeat(40);
    let above = format!("{whole}{tail}1e{}", scale - 41);
    let below = format!("{}{}e{}", whole - 1, "9".repeat(41), scale - 41);
    same(&above) && same(&below)
}

fn laid_out(digits: &str, exponent: i32, exponents: i32) -> String {
    let count = digits.len() as i32;
    if exponent < -4 || exponent >= exponents {
        let (first, rest) = digits.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{first}{point}{rest}e{sign}{:02}", exponent.abs());
    }
    if exponent < 0 {
        return format!("0.{}{digits}", "0".repeat((-exponent - 1) as usize));
    }
    if exponent + 1 >= count {
        return format!("{digits}{}", "0".repeat((exponent + 1 - count) as usize));
    }
    let (whole, fraction) = digits.split_at((exponent + 1) as usize);
    format!("{whole}.{fraction}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown8(value: f64) -> String {
        String::from_utf8(write8(value, false)).expect("ascii")
    }

    #[test]
    fn text_is_what_postgres_prints() {
        // From `SELECT x::float8` of Postgres 15.
        for text in [
            "0",
            "-0",
            "1",
            "-1.5",
            "0.1",
            "0.0001",
            "1e-05",
            "1.5e-05",
            "123456789012345",
            "1e+15",
            "1.5e+16",
            "9.007199254740993e+15",
            "5e-324",
            "2.2250738585072014e-308",
            "1.7976931348623157e+308",
            "0.30000000000000004",
            "123456.789",
            "2.2768936157226562",
            "1e+100",
            "Infinity",
            "-Infinity",
            "NaN",
        ] {
            let value: f64 = text.parse().expect(text);
            assert_eq!(shown8(value), text.replace("993e+15", "992e+15"), "{value:e}");
        }
        for text in ["0.1", "1e+06", "123456", "1.2345679e+08", "3.4028235e+38", "1e-45", "16777216", "-0", "NaN"] {
            let value: f32 = text.parse().expect(text);
            let shown = String::from_utf8(write4(value, false)).expect("ascii");
            assert_eq!(shown, text.replace("16777216", "1.6777216e+07"));
        }
    }

    #[test]
    fn sums_follow_the_rules_of_infinity_and_overflow() {
        let sum = |parts: &[f64]| sum8(&parts.iter().map(|part| (*part, 1)).collect::<Vec<_>>());
        assert_eq!(sum(&[]), Ok(None));
        assert_eq!(sum(&[-0.0, -0.0]).map(|sum| sum.map(f64::to_bits)), Ok(Some((-0.0_f64).to_bits())));
        assert_eq!(sum(&[f64::INFINITY, 1.0]), Ok(Some(f64::INFINITY)));
        assert!(sum(&[f64::INFINITY, f64::NEG_INFINITY]).is_ok_and(|sum| sum.is_some_and(f64::is_nan)));
        assert_eq!(sum(&[f64::MAX, f64::MAX]).map_err(|error| error.sqlstate), Err(OUT_OF_RANGE));
        assert_eq!(sum4(&[(3e38, 1), (3e38, 1)]).map_err(|error| error.sqlstate), Err(OUT_OF_RANGE));
        assert_eq!(sum4(&[(16_777_216.0, 1), (1.0, 1)]), Ok(Some(16_777_216.0)), "added as real");
        assert_eq!(average(&[(1.0, 1), (0.0, 0), (5.0, 2)]), Ok(Some(2.0)));
        assert_eq!(average(&[(0.0, 0)]), Ok(None));
        assert_eq!(average(&[(1e200, 1), (-1e200, 1)]).map_err(|error| error.sqlstate), Err(OUT_OF_RANGE));
        assert_eq!(average(&[(f64::INFINITY, 1), (1.0, 1)]), Ok(Some(f64::INFINITY)));
        assert!(average(&[(1e200, 1), (-1e200, 1), (f64::NAN, 1)]).is_ok_and(|it| it.is_some_and(f64::is_nan)));
    }
}
