//! Money as whole cents, so that sums are exact.
//!
//! Invariant: no float ever holds an amount. Non-goal: currencies other than the dollar of the catalogue.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An amount in cents. Displays as `$1,234.56`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cents(pub i64);

impl Cents {
    /// The amount `quantity` times, or `None` where it leaves the range.
    pub fn times(self, quantity: i32) -> Option<Self> {
        self.0.checked_mul(i64::from(quantity)).map(Self)
    }

    /// Reads `12`, `12.3`, `12.34` or `$1,234.56`; refuses negative amounts, fractions of a cent and anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix('$').unwrap_or(text);
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let groups: Vec<&str> = whole.split(',').collect();
        let grouped = groups.len() == 1 || (groups[0].len() <= 3 && groups[1..].iter().all(|group| group.len() == 3));
        if groups.iter().any(|group| group.is_empty() || !digits(group)) || !grouped || part.len() > 2 || !digits(part)
        {
            return None;
        }
        let dollars: i64 = groups.concat().parse().ok()?;
        let cents: i64 = if part.is_empty() { 0 } else { format!("{part:0<2}").parse().ok()? };
        dollars.checked_mul(100)?.checked_add(cents).map(Self)
    }
}

impl fmt::Display for Cents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.0.unsigned_abs();
        let dollars = (amount / 100).to_string();
        let mut grouped = String::new();
        for (index, digit) in dollars.chars().enumerate() {
            if index > 0 && (dollars.len() - index).is_multiple_of(3) {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        let sign = if self.0 < 0 { "−" } else { "" };
        write!(f, "{sign}${grouped}.{:02}", amount % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_like_a_price_tag() {
        for (cents, text) in
            [(0, "$0.00"), (5, "$0.05"), (99_999, "$999.99"), (100_000, "$1,000.00"), (123_456_789, "$1,234,567.89")]
        {
            assert_eq!(Cents(cents).to_string(), text);
            assert_eq!(Cents::parse(text), Some(Cents(cents)));
        }
        assert_eq!(Cents(-150).to_string(), "−$1.50");
        assert_eq!(Cents(i64::MIN).to_string(), "−$92,233,720,368,547,758.08");
    }

    #[test]
    fn prices_parse_or_are_refused() {
        for (text, cents) in [("12", 1200), ("12.3", 1230), ("12.34", 1234), (" $7 ", 700), ("0.07", 7), ("12.", 1200)]
        {
            assert_eq!(Cents::parse(text), Some(Cents(cents)), "{text:?}");
        }
        for text in ["", ".", ".5", "-1", "1.234", "1,23", "1,,000", "12e3", "$", "92233720368547758.08", "１"] {
            assert_eq!(Cents::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn multiplication_is_checked() {
        assert_eq!(Cents(250).times(3), Some(Cents(750)));
        assert_eq!(Cents(i64::MAX).times(2), None);
    }
}
