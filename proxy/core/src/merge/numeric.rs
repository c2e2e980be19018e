//! Postgres's numeric: reading and writing both formats, exact sums, and its own division.
//!
//! Invariant: what is written is byte-identical to what one server would send for the same value and display scale.
//! Non-goals: any arithmetic beyond what re-aggregation and expressions over aggregates need. Source: src/backend/utils/adt/numeric.c.

use std::cmp::Ordering;

use num_bigint::{BigInt, BigUint, Sign};
use smallvec::SmallVec;

/// `NUMERIC_MIN_SIG_DIGITS`: significant digits a quotient has at least.
const QUOTIENT_DIGITS_MIN: i64 = 16;
/// `NUMERIC_MAX_DISPLAY_SCALE`.
const DISPLAY_SCALE_MAX: i64 = 1000;
const SIGN_NEGATIVE: u16 = 0x4000;
const SIGN_NAN: u16 = 0xC000;
const SIGN_POSITIVE_INFINITY: u16 = 0xD000;
const SIGN_NEGATIVE_INFINITY: u16 = 0xF000;
/// What `numeric_send` makes of an infinity's header bits; it means nothing, but it is what a server sends.
const INFINITY_SCALE: u16 = 32;

/// A numeric value as it came off the wire.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Decimal {
    NegativeInfinity,
    Finite(Digits),
    PositiveInfinity,
    Nan,
}

/// Plain decimal digits.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Digits {
    pub(super) negative: bool,
    /// Values 0 to 9, most significant first; leading and trailing zeros may be there.
    pub(super) values: SmallVec<[u8; 32]>,
    /// How many of `values` stand before the decimal point; may be negative or beyond their end.
    pub(super) point: i64,
    /// Display scale: fractional digits shown.
    pub(super) scale: u16,
}

impl Decimal {
    /// `None` unless this is what `numeric_out` writes.
    pub(super) fn from_text(text: &[u8]) -> Option<Self> {
        match text {
            b"NaN" => return Some(Decimal::Nan),
            b"Infinity" => return Some(Decimal::PositiveInfinity),
            b"-Infinity" => return Some(Decimal::NegativeInfinity),
            _ => {}
        }
        let (negative, text) = match text.strip_prefix(b"-") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let point = memchr::memchr(b'.', text).unwrap_or(text.len());
        let fraction = text.get(point + 1..).unwrap_or_default();
        let mut digits = SmallVec::with_capacity(text.len());
        for byte in text[..point].iter().chain(fraction) {
            digits.push(byte.is_ascii_digit().then(|| byte - b'0')?);
        }
        let scale = u16::try_from(fraction.len()).ok()?;
        (!digits.is_empty()).then_some(Decimal::Finite(Digits { negative, values: digits, point: point as i64, scale }))
    }

    /// `None` unless this is what `numeric_send` writes.
    pub(super) fn from_binary(bytes: &[u8]) -> Option<Self> {
        let word = |index: usize| Some(u16::from_be_bytes(bytes.get(2 * index..2 * index + 2)?.try_into().ok()?));
        let (count, weight, sign, scale) = (word(0)?, word(1)? as i16, word(2)?, word(3)?);
        if bytes.len() != 8 + 2 * usize::from(count) {
            return None;
        }
        let negative = match sign {
            0 => false,
            SIGN_NEGATIVE => true,
            SIGN_NAN => return Some(Decimal::Nan),
            SIGN_POSITIVE_INFINITY => return Some(Decimal::PositiveInfinity),
            SIGN_NEGATIVE_INFINITY => return Some(Decimal::NegativeInfinity),
            _ => return None,
        };
        let mut digits = SmallVec::with_capacity(4 * usize::from(count));
        for index in 0..usize::from(count) {
            let group = word(4 + index)?;
            if group > 9999 {
                return None;
            }
            digits.extend([1000, 100, 10, 1].map(|unit| (group / unit % 10) as u8));
        }
        Some(Decimal::Finite(Digits { negative, values: digits, point: 4 * (i64::from(weight) + 1), scale }))
    }

    /// Appends bytes that compare as the values do: -inf < numbers < inf < NaN, equal numbers alike at any scale.
    pub(super) fn sort_key(&self, out: &mut Vec<u8>) {
        let finite = match self {
            Decimal::NegativeInfinity => return out.push(1),
            Decimal::PositiveInfinity => return out.push(5),
            Decimal::Nan => return out.push(6),
            Decimal::Finite(finite) => finite,
        };
        let Some(first) = finite.values.iter().position(|&digit| digit != 0) else {
            return out.push(3);
        };
        let end = finite.values.iter().rposition(|&digit| digit != 0).unwrap_or(first) + 1;
        out.push(if finite.negative { 2 } else { 4 });
        let start = out.len();
        let exponent = (finite.point - first as i64) as i32;
        out.extend_from_slice(&((exponent as u32) ^ 0x8000_0000).to_be_bytes());
        // Digits are shifted up by one, so that the end of a number sorts below any further digit.
        out.extend(finite.values[first..end].iter().map(|digit| digit + 1));
        out.push(0);
        if finite.negative {
            out[start..].iter_mut().for_each(|byte| *byte = !*byte);
        }
    }
}

/// A numeric that can be added up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Numeric {
    NegativeInfinity,
    /// `unscaled * 10^-scale`, shown with `scale` fractional digits.
    Finite {
        unscaled: BigInt,
        scale: u16,
    },
    PositiveInfinity,
    Nan,
}

impl From<i128> for Numeric {
    fn from(value: i128) -> Self {
        Numeric::Finite { unscaled: BigInt::from(value), scale: 0 }
    }
}

impl From<Decimal> for Numeric {
    fn from(decimal: Decimal) -> Self {
        match decimal {
            Decimal::NegativeInfinity => Numeric::NegativeInfinity,
            Decimal::PositiveInfinity => Numeric::PositiveInfinity,
            Decimal::Nan => Numeric::Nan,
            Decimal::Finite(Digits { negative, values: mut digits, point, scale }) => {
                // Exactly `scale` digits after the point. A server's binary digits come in fours, so some may be cut;
                // those are zeros.
                let wanted = usize::try_from(point + i64::from(scale)).unwrap_or(0);
                digits.resize(wanted, 0);
                let magnitude = BigUint::from_radix_be(&digits, 10).unwrap_or_default();
                let sign = if negative { Sign::Minus } else { Sign::Plus };
                Numeric::Finite { unscaled: BigInt::from_biguint(sign, magnitude), scale }
            }
        }
    }
}

impl Numeric {
    /// Exact sum; its display scale is the larger one. Infinities of both signs make NaN.
    pub(super) fn add(&mut self, other: Numeric) {
        let left = std::mem::replace(self, Numeric::Nan);
        *self = match (left, other) {
            (Numeric::Nan, _) | (_, Numeric::Nan) => Numeric::Nan,
            (Numeric::PositiveInfinity, Numeric::NegativeInfinity)
            | (Numeric::NegativeInfinity, Numeric::PositiveInfinity) => Numeric::Nan,
            (infinity @ (Numeric::PositiveInfinity | Numeric::NegativeInfinity), _) => infinity,
            (_, infinity @ (Numeric::PositiveInfinity | Numeric::NegativeInfinity)) => infinity,
            (Numeric::Finite { unscaled: a, scale: i }, Numeric::Finite { unscaled: b, scale: j }) => {
                let scale = i.max(j);
                Numeric::Finite { unscaled: rescaled(a, scale - i) + rescaled(b, scale - j), scale }
            }
        };
    }

    /// `numeric_div(self, count)` for a positive count.
    pub(super) fn divide(&self, count: i128) -> Numeric {
        // Only infinities and NaN have no quotient here, and those stay what they are.
        self.over(&Numeric::from(count)).unwrap_or_else(|| self.clone())
    }

    /// `numeric_div` of finite numbers, with the scale `select_div_scale` gives it; `None` for others and for a zero divisor.
    pub(super) fn over(&self, divisor: &Numeric) -> Option<Numeric> {
        let (Numeric::Finite { unscaled, scale }, Numeric::Finite { unscaled: by, scale: by_scale }) = (self, divisor)
        else {
            return None;
        };
        if divisor.is_zero() {
            return None;
        }
        let (weight, first) = leading_group(unscaled, *scale);
        let (by_weight, by_first) = leading_group(by, *by_scale);
        let quotient_weight = weight - by_weight - i64::from(first <= by_first);
        let wanted = (QUOTIENT_DIGITS_MIN - 4 * quotient_weight)
            .max(i64::from(*scale))
            .max(i64::from(*by_scale))
            .clamp(0, DISPLAY_SCALE_MAX) as u16;
        // unscaled / 10^scale / (by / 10^by_scale), in units of 10^-wanted.
        let up = u32::from(wanted) + u32::from(*by_scale);
        let (mut numerator, mut denominator) = (unscaled.clone(), by.clone());
        match up.checked_sub(u32::from(*scale)) {
            Some(more) => numerator *= BigInt::from(10).pow(more),
            None => denominator *= BigInt::from(10).pow(u32::from(*scale) - up),
        }
        Some(Numeric::Finite { unscaled: divided_half_away(&numerator, &denominator), scale: wanted })
    }

    /// What a number written with digits and at most one point stands for.
    pub(super) fn read(text: &[u8]) -> Option<Numeric> {
        Decimal::from_text(text).map(Numeric::from)
    }

    pub(super) fn is_finite(&self) -> bool {
        matches!(self, Numeric::Finite { .. })
    }

    pub(super) fn is_zero(&self) -> bool {
        matches!(self, Numeric::Finite { unscaled, .. } if unscaled.sign() == Sign::NoSign)
    }

    pub(super) fn negated(self) -> Numeric {
        match self {
            Numeric::Finite { unscaled, scale } => Numeric::Finite { unscaled: -unscaled, scale },
            Numeric::PositiveInfinity => Numeric::NegativeInfinity,
            Numeric::NegativeInfinity => Numeric::PositiveInfinity,
            Numeric::Nan => Numeric::Nan,
        }
    }

    /// `numeric_mul` of finite numbers; `None` for others, and beyond the scale it would round to.
    pub(super) fn times(&self, other: &Numeric) -> Option<Numeric> {
        let (Numeric::Finite { unscaled: a, scale: i }, Numeric::Finite { unscaled: b, scale: j }) = (self, other)
        else {
            return None;
        };
        let scale = i.checked_add(*j).filter(|scale| i64::from(*scale) <= DISPLAY_SCALE_MAX)?;
        Some(Numeric::Finite { unscaled: a * b, scale })
    }

    /// `numeric_round` of a finite number: half away from zero.
    pub(super) fn rounded(&self, digits: u16) -> Option<Numeric> {
        let Numeric::Finite { unscaled, scale } = self else { return None };
        let unscaled = match digits.checked_sub(*scale) {
            Some(more) => rescaled(unscaled.clone(), more),
            None => divided_half_away(unscaled, &rescaled(BigInt::from(1), *scale - digits)),
        };
        Some(Numeric::Finite { unscaled, scale: digits })
    }

    /// Finite numbers by value, whatever their scales; others are not asked for.
    pub(super) fn compare(&self, other: &Numeric) -> Ordering {
        let (Numeric::Finite { unscaled: a, scale: i }, Numeric::Finite { unscaled: b, scale: j }) = (self, other)
        else {
            return Ordering::Equal;
        };
        let scale = (*i).max(*j);
        rescaled(a.clone(), scale - i).cmp(&rescaled(b.clone(), scale - j))
    }

    pub(super) fn to_text(&self) -> String {
        let (unscaled, scale) = match self {
            Numeric::Nan => return "NaN".into(),
            Numeric::PositiveInfinity => return "Infinity".into(),
            Numeric::NegativeInfinity => return "-Infinity".into(),
            Numeric::Finite { unscaled, scale } => (unscaled, usize::from(*scale)),
        };
        let sign = if unscaled.sign() == Sign::Minus { "-" } else { "" };
        // At least one digit before the point.
        let digits = format!("{:0>1$}", unscaled.magnitude().to_string(), scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        let point = if scale > 0 { "." } else { "" };
        format!("{sign}{whole}{point}{fraction}")
    }

    /// `None` if the value has more digits than the format can say.
    pub(super) fn to_binary(&self) -> Option<Vec<u8>> {
        let (unscaled, scale) = match self {
            Numeric::Nan => return Some(words(&[0, 0, SIGN_NAN, 0])),
            Numeric::PositiveInfinity => return Some(words(&[0, 0, SIGN_POSITIVE_INFINITY, INFINITY_SCALE])),
            Numeric::NegativeInfinity => return Some(words(&[0, 0, SIGN_NEGATIVE_INFINITY, INFINITY_SCALE])),
            Numeric::Finite { unscaled, scale } => (unscaled, *scale),
        };
        // The point must fall between two groups of four digits.
        let padding = (4 - scale % 4) % 4;
        let fraction_groups = i64::from((scale + padding) / 4);
        let mut digits = rescaled(unscaled.clone(), padding).magnitude().to_radix_be(10);
        let lead = (4 - digits.len() % 4) % 4;
        digits.splice(0..0, std::iter::repeat_n(0, lead));
        let groups: Vec<u16> =
            digits.chunks(4).map(|group| group.iter().fold(0, |value, &digit| value * 10 + u16::from(digit))).collect();
        let Some(first) = groups.iter().position(|&group| group != 0) else {
            return Some(words(&[0, 0, 0, scale]));
        };
        let end = groups.iter().rposition(|&group| group != 0).unwrap_or(first) + 1;
        let weight = i16::try_from(groups.len() as i64 - fraction_groups - 1 - first as i64).ok()?;
        let sign = if unscaled.sign() == Sign::Minus { SIGN_NEGATIVE } else { 0 };
        let mut out = words(&[u16::try_from(end - first).ok()?, weight as u16, sign, scale]);
        out.extend(words(&groups[first..end]));
        Some(out)
    }
}

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn rescaled(value: BigInt, digits: u16) -> BigInt {
    if digits == 0 { value } else { value * BigInt::from(10).pow(u32::from(digits)) }
}

/// Weight (power of 10000) and value of the first non-zero group of four digits, aligned at the point; zeros for zero.
fn leading_group(unscaled: &BigInt, scale: u16) -> (i64, u32) {
    if unscaled.sign() == Sign::NoSign {
        return (0, 0);
    }
    let digits = unscaled.magnitude().to_radix_be(10);
    let above_point = digits.len() as i64 - i64::from(scale) - 1;
    let in_group = above_point.rem_euclid(4) as usize + 1;
    let group = (0..in_group).fold(0, |value, index| value * 10 + u32::from(digits.get(index).copied().unwrap_or(0)));
    (above_point.div_euclid(4), group)
}

fn divided_half_away(numerator: &BigInt, denominator: &BigInt) -> BigInt {
    let quotient = numerator / denominator;
    let rest = numerator % denominator;
    if rest.magnitude() * 2_u32 < *denominator.magnitude() {
        quotient
    } else if numerator.sign() == denominator.sign() {
        quotient + 1
    } else {
        quotient - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numeric(text: &str) -> Numeric {
        Decimal::from_text(text.as_bytes()).expect(text).into()
    }

    #[test]
    fn text_and_binary_round_trip() {
        for text in [
            "0",
            "0.00",
            "1",
            "-1",
            "10000",
            "9999",
            "0.0001",
            "0.00001",
            "-123456789.987654321",
            "100000000",
            "1.50",
            "0.1000",
            "12345678901234567890123456789012345678901234567890.5",
            "NaN",
            "Infinity",
            "-Infinity",
        ] {
            let value = numeric(text);
            assert_eq!(value.to_text(), text);
            let binary = value.to_binary().expect(text);
            assert_eq!(Numeric::from(Decimal::from_binary(&binary).expect(text)), value, "{text}");
        }
        for bad in ["", ".", "-", "1e5", "+1", "1.2.3", " 1"] {
            assert_eq!(Decimal::from_text(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn binary_has_no_outer_zero_groups() {
        assert_eq!(numeric("10000.00").to_binary(), Some(words(&[1, 1, 0, 2, 1])));
        assert_eq!(numeric("0.00010").to_binary(), Some(words(&[1, -1_i16 as u16, 0, 5, 1])));
        assert_eq!(numeric("-1.5").to_binary(), Some(words(&[2, 0, SIGN_NEGATIVE, 1, 1, 5000])));
        assert_eq!(numeric("-Infinity").to_binary(), Some(words(&[0, 0, 0xF000, 32])));
        assert_eq!(numeric("0.000").to_binary(), Some(words(&[0, 0, 0, 3])));
    }

    #[test]
    fn quotients_have_postgres_scale() {
        for (sum, count, quotient) in [
            ("3", 3, "1.00000000000000000000"),
            ("10", 4, "2.5000000000000000"),
            ("10", 3, "3.3333333333333333"),
            ("1", 3, "0.33333333333333333333"),
            ("100000", 3, "33333.333333333333"),
            ("-2", 3, "-0.66666666666666666667"),
            ("0", 5, "0.00000000000000000000"),
            ("0.00", 1, "0.00000000000000000000"),
            ("1.50", 2, "0.75000000000000000000"),
            ("Infinity", 2, "Infinity"),
        ] {
            assert_eq!(numeric(sum).divide(count).to_text(), quotient, "{sum} / {count}");
        }
    }

    #[test]
    fn sums_keep_the_larger_scale() {
        for (left, right, sum) in [
            ("1.5", "2.250", "3.750"),
            ("-1.00", "1", "0.00"),
            ("Infinity", "-5", "Infinity"),
            ("Infinity", "-Infinity", "NaN"),
            ("NaN", "1", "NaN"),
        ] {
            let mut total = numeric(left);
            total.add(numeric(right));
            assert_eq!(total.to_text(), sum);
        }
    }

    #[test]
    fn sort_keys_follow_the_values() {
        let ascending = [
            "-Infinity",
            "-10000",
            "-9999.5",
            "-10",
            "-1.01",
            "-1",
            "-0.001",
            "0",
            "0.0005",
            "0.01",
            "0.1",
            "1",
            "1.0001",
            "2",
            "10",
            "Infinity",
            "NaN",
        ];
        let key = |decimal: Decimal| {
            let mut out = Vec::new();
            decimal.sort_key(&mut out);
            out
        };
        let keys: Vec<_> = ascending.iter().map(|text| key(Decimal::from_text(text.as_bytes()).expect(text))).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
        for text in ["1.0", "1.0000", "0.100", "100", "-0.0", "0.00"] {
            let short = match text {
                "100" => "100.000",
                "0.100" => "0.1",
                "-0.0" | "0.00" => "0",
                _ => "1",
            };
            let binary = numeric(text).to_binary().expect(text);
            assert_eq!(
                key(Decimal::from_binary(&binary).expect(text)),
                key(Decimal::from_text(short.as_bytes()).expect(short)),
                "{text}"
            );
        }
    }
}
