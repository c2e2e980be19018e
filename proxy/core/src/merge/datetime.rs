//! Dates and times in the text Postgres writes with DateStyle ISO, as the numbers it stores.
//!
//! Invariant: `None` for anything that is not exactly that form, because the other styles (SQL, German, Postgres) do
//! not say which number is the month. Source of the forms: EncodeDateOnly, EncodeTimeOnly, EncodeDateTime in
//! src/backend/utils/adt/datetime.c.

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;

/// Days since 2000-01-01; `i64::MIN` and `i64::MAX` for the infinities.
pub(super) fn date(text: &[u8]) -> Option<i64> {
    if let Some(infinity) = infinity(text) {
        return Some(infinity);
    }
    let (text, before_christ) = era(text);
    let (days, rest) = day(text, before_christ)?;
    rest.is_empty().then_some(days)
}

/// Microseconds since 2000-01-01 00:00; `i64::MIN` and `i64::MAX` for the infinities. With `zoned` an offset from UTC must
/// follow and the result is UTC, else none may.
pub(super) fn timestamp(text: &[u8], zoned: bool) -> Option<i64> {
    if let Some(infinity) = infinity(text) {
        return Some(infinity);
    }
    let (text, before_christ) = era(text);
    let (days, rest) = day(text, before_christ)?;
    let (micros, rest) = clock(rest.strip_prefix(b" ")?)?;
    let east = match (zoned, rest) {
        (false, []) => 0,
        (true, [b'+', offset @ ..]) => offset_seconds(offset)?,
        (true, [b'-', offset @ ..]) => -offset_seconds(offset)?,
        _ => return None,
    };
    let seconds = days.checked_mul(SECONDS_PER_DAY)?.checked_sub(east)?;
    seconds.checked_mul(MICROS_PER_SECOND)?.checked_add(micros)
}

/// Microseconds since midnight, up to and including 24:00:00.
pub(super) fn time(text: &[u8]) -> Option<i64> {
    let (micros, rest) = clock(text)?;
    rest.is_empty().then_some(micros)
}

fn infinity(text: &[u8]) -> Option<i64> {
    match text {
        b"infinity" => Some(i64::MAX),
        b"-infinity" => Some(i64::MIN),
        _ => None,
    }
}

fn era(text: &[u8]) -> (&[u8], bool) {
    match text.strip_suffix(b" BC") {
        Some(rest) => (rest, true),
        None => (text, false),
    }
}

/// `YYYY-MM-DD` with at least four year digits, which no other DateStyle starts with.
fn day(text: &[u8], before_christ: bool) -> Option<(i64, &[u8])> {
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !(4..=7).contains(&length) {
        return None;
    }
    let (year, rest) = digits(text, length)?;
    let (month, rest) = digits(rest.strip_prefix(b"-")?, 2)?;
    let (day, rest) = digits(rest.strip_prefix(b"-")?, 2)?;
    if year == 0 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = if before_christ { 1 - year } else { year };
    Some((days_since_2000(year, month, day), rest))
}

/// Days of the proleptic Gregorian calendar, years counted with a year zero.
fn days_since_2000(year: i64, month: i64, day: i64) -> i64 {
    // A year that starts in March has its leap day last, so month lengths follow one formula.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days_before_year = year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let days_before_month = (month * 153 + 2) / 5;
    /// The same sum for 2000-01-01.
    const ORIGIN: i64 = 730_425;
    days_before_year + days_before_month + day - 1 - ORIGIN
}

/// `HH:MM:SS` with up to six fractional digits.
fn clock(text: &[u8]) -> Option<(i64, &[u8])> {
    let (hour, rest) = digits(text, 2)?;
    let (minute, rest) = digits(rest.strip_prefix(b":")?, 2)?;
    let (second, mut rest) = digits(rest.strip_prefix(b":")?, 2)?;
    if hour > 24 || minute > 59 || second > 60 {
        return None;
    }
    let mut micros = ((hour * 60 + minute) * 60 + second) * MICROS_PER_SECOND;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if !(1..=6).contains(&length) {
            return None;
        }
        let (value, after) = digits(fraction, length)?;
        micros += value * 10_i64.pow(6 - length as u32);
        rest = after;
    }
    Some((micros, rest))
}

/// `HH`, `HH:MM` or `HH:MM:SS`, the whole of `text`.
fn offset_seconds(text: &[u8]) -> Option<i64> {
    let (hours, mut rest) = digits(text, 2)?;
    let mut seconds = hours * 3600;
    for unit in [60, 1] {
        if rest.is_empty() {
            break;
        }
        let (value, after) = digits(rest.strip_prefix(b":")?, 2)?;
        seconds += value * unit;
        rest = after;
    }
    rest.is_empty().then_some(seconds)
}

/// The number in exactly the first `length` bytes, and what follows them.
fn digits(text: &[u8], length: usize) -> Option<(i64, &[u8])> {
    let (head, rest) = text.split_at_checked(length)?;
    let value = head
        .iter()
        .try_fold(0_i64, |value, byte| byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0')))?;
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_count_as_postgres_stores_them() {
        let vectors: [(&str, i64); 9] = [
            ("2000-01-01", 0),
            ("1999-12-31", -1),
            ("2000-03-01", 60),
            ("1970-01-01", -10957),
            ("0001-01-01", -730119),
            ("0001-12-31 BC", -730120),
            ("4714-11-24 BC", -2451545),
            ("5874897-12-31", 2145031948),
            ("infinity", i64::MAX),
        ];
        for (text, days) in vectors {
            assert_eq!(date(text.as_bytes()), Some(days), "{text}");
        }
        for bad in ["01/02/2024", "02.01.2024", "01-02-2024", "2024-13-01", "2024-1-1", "2024-01-01 ", "", "0000-01-01"]
        {
            assert_eq!(date(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn timestamps_and_offsets_are_exact() {
        let vectors: [(&str, bool, i64); 7] = [
            ("2000-01-01 00:00:00.5", false, 500_000),
            ("2000-01-01 00:00:00.000001+00", true, 1),
            ("2000-01-01 05:30:00+05:30", true, 0),
            ("1999-12-31 19:00:00-05", true, 0),
            ("2000-01-01 05:53:28+05:53:28", true, 0),
            ("0001-12-31 23:59:59+00 BC", true, -63_082_281_601 * MICROS_PER_SECOND),
            ("-infinity", true, i64::MIN),
        ];
        for (text, zoned, micros) in vectors {
            assert_eq!(timestamp(text.as_bytes(), zoned), Some(micros), "{text}");
        }
        for bad in ["2000-01-01 00:00:00 UTC", "2000-01-01 00:00:00", "Sat Jan 01 00:00:00 2000 UTC", "2000-01-01"] {
            assert_eq!(timestamp(bad.as_bytes(), true), None, "{bad}");
        }
        assert_eq!(timestamp(b"2000-01-01 00:00:00+00", false), None);
        assert_eq!(time(b"24:00:00"), Some(86_400 * MICROS_PER_SECOND));
        assert_eq!(time(b"00:00:01.5"), Some(1_500_000));
        assert_eq!(time(b"00:00:01+00"), None);
    }
}
