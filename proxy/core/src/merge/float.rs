//! float4 and float8 in Postgres's shortest exact text (`extra_float_digits` at its default).
//!
//! Source of the behaviour: src/common/d2s.c and f2s.c: shortest digits that lie strictly between the neighbours'
//! midpoints, of two equally near ones the even one, fixed notation for decimal exponents from -4 up to 14 (float8) or 5 (float4), else `d.ddde+XX`.

use num_bigint::BigInt;

/// Text of a float8.
pub(super) fn text8(value: f64) -> String {
    if let Some(special) = special(value) {
        return special.into();
    }
    let bits = value.to_bits();
    let fraction = bits & ((1 << 52) - 1);
    let exponent = ((bits >> 52) & 0x7ff) as i32;
    let binary = Binary::new(fraction, exponent, 52, -1074);
    let parses_back = |text: &str| text.parse::<f64>().is_ok_and(|parsed| parsed.to_bits() == bits & (u64::MAX >> 1));
    let magnitude = value.abs();
    let render = |precision: Option<usize>| match precision {
        None => format!("{magnitude:e}"),
        Some(precision) => format!("{magnitude:.precision$e}"),
    };
    layout(value.is_sign_negative(), &strict(render, parses_back, &binary), 15)
}

/// Text of a float4.
pub(super) fn text4(value: f32) -> String {
    if let Some(special) = special(f64::from(value)) {
        return special.into();
    }
    let bits = value.to_bits();
    let fraction = u64::from(bits & ((1 << 23) - 1));
    let exponent = ((bits >> 23) & 0xff) as i32;
    let binary = Binary::new(fraction, exponent, 23, -149);
    let parses_back = |text: &str| text.parse::<f32>().is_ok_and(|parsed| parsed.to_bits() == bits & (u32::MAX >> 1));
    let magnitude = value.abs();
    let render = |precision: Option<usize>| match precision {
        None => format!("{magnitude:e}"),
        Some(precision) => format!("{magnitude:.precision$e}"),
    };
    layout(value.is_sign_negative(), &strict(render, parses_back, &binary), 6)
}

fn special(value: f64) -> Option<&'static str> {
    if value.is_nan() {
        Some("NaN")
    } else if value.is_infinite() {
        Some(if value > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        None
    }
}

/// A magnitude as `mantissa * 2^exponent`.
struct Binary {
    mantissa: u64,
    exponent: i32,
    /// The neighbour below is half as far away as the one above.
    narrow_below: bool,
}

impl Binary {
    fn new(fraction: u64, exponent: i32, fraction_bits: u32, exponent_min: i32) -> Self {
        if exponent == 0 {
            return Binary { mantissa: fraction, exponent: exponent_min, narrow_below: false };
        }
        Binary {
            mantissa: fraction | 1 << fraction_bits,
            exponent: exponent_min + exponent - 1,
            narrow_below: fraction == 0 && exponent > 1,
        }
    }

    /// Is `digits * 10^power` exactly half-way to a neighbour?
    fn is_midpoint(&self, digits: u64, power: i32) -> bool {
        let below = if self.narrow_below { 1 } else { 2 };
        self.is_quarters_off(-below, digits, power) || self.is_quarters_off(2, digits, power)
    }

    /// Is `digits * 10^power` exactly the value plus that many quarters of its last place?
    fn is_quarters_off(&self, quarters: i128, digits: u64, power: i32) -> bool {
        let mut decimal = BigInt::from(digits);
        let mut binary = BigInt::from(self.mantissa as i128 * 4 + quarters);
        let scale = |value: &mut BigInt, base: u32, power: i32| *value *= BigInt::from(base).pow(power.unsigned_abs());
        scale(if power >= 0 { &mut decimal } else { &mut binary }, 10, power);
        let exponent = self.exponent - 2;
        scale(if exponent >= 0 { &mut binary } else { &mut decimal }, 2, exponent);
        decimal == binary
    }
}

/// Rust's shortest digits with the two differences of Postgres's: a midpoint, which reads back only by rounding to even, is
/// never printed; and of two equally near ones the even one is, where Rust takes the larger.
fn strict(render: impl Fn(Option<usize>) -> String, parses_back: impl Fn(&str) -> bool, binary: &Binary) -> String {
    let acceptable = |text: &str| {
        let (digits, power) = integer(text);
        !binary.is_midpoint(digits, power)
    };
    let mut text = render(None);
    if !acceptable(&text) {
        let length = parts(&text).0.len();
        let longer = (length..17).map(|precision| render(Some(precision)));
        text = longer.into_iter().find(|text| parses_back(text) && acceptable(text)).unwrap_or(text);
    }
    let (digits, power) = integer(&text);
    let is_tie = digits % 2 == 1 && binary.is_quarters_off(0, digits * 10 - 5, power - 1);
    if is_tie && parses_back(&format!("{}e{power}", digits - 1)) && !binary.is_midpoint(digits - 1, power) {
        return scientific(digits - 1, power);
    }
    text
}

/// The digits as one number, and the power of ten it is to be multiplied with.
fn integer(scientific: &str) -> (u64, i32) {
    let (digits, exponent) = parts(scientific);
    // At most 17 digits.
    (digits.parse().unwrap_or(0), exponent - (digits.len() as i32 - 1))
}

fn scientific(digits: u64, power: i32) -> String {
    let digits = digits.to_string();
    let (first, rest) = digits.split_at(1);
    format!("{first}.{rest}e{}", power + digits.len() as i32 - 1)
}

/// Digits without a point, and the decimal exponent of the first.
fn parts(scientific: &str) -> (String, i32) {
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((scientific, "0"));
    let digits = mantissa.chars().filter(char::is_ascii_digit).collect();
    (digits, exponent.parse().unwrap_or(0))
}

fn layout(negative: bool, scientific: &str, fixed_below: i32) -> String {
    let (digits, exponent) = parts(scientific);
    let sign = if negative { "-" } else { "" };
    if !(-4..fixed_below).contains(&exponent) {
        let (first, rest) = digits.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{first}{point}{rest}e{exponent_sign}{:02}", exponent.abs());
    }
    if exponent < 0 {
        return format!("{sign}0.{}{digits}", "0".repeat((-exponent - 1) as usize));
    }
    let integers = exponent as usize + 1;
    if digits.len() <= integers {
        return format!("{sign}{digits}{}", "0".repeat(integers - digits.len()));
    }
    let (whole, fraction) = digits.split_at(integers);
    format!("{sign}{whole}.{fraction}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float8_text_is_postgres_text() {
        let vectors = [
            (0.0, "0"),
            (-0.0, "-0"),
            (0.1 + 0.2, "0.30000000000000004"),
            (100.0, "100"),
            (-1.5, "-1.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (123456789012345.0, "123456789012345"),
            (1e15, "1e+15"),
            (1.25e100, "1.25e+100"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (1e23, "9.999999999999999e+22"),
            (615474524764674.0 + 0.25, "615474524764674.2"),
            (615474524764674.0 + 0.75, "615474524764674.8"),
            (2.9802322387695312e-08, "2.9802322387695312e-08"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (value, text) in vectors {
            assert_eq!(text8(value), text);
        }
    }

    #[test]
    fn float4_text_is_postgres_text() {
        let vectors = [
            (0.1_f32, "0.1"),
            (164146.0 + 0.125, "164146.12"),
            (1e6, "1e+06"),
            (123456.0, "123456"),
            (1234567.0, "1.234567e+06"),
            (16777216.0, "1.6777216e+07"),
            (f32::MAX, "3.4028235e+38"),
            (1e-45, "1e-45"),
            (-0.0001, "-0.0001"),
        ];
        for (value, text) in vectors {
            assert_eq!(text4(value), text);
        }
    }
}
