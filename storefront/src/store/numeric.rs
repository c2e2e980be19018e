//! Reads Postgres `numeric` values: what `sum(bigint)` and `avg(bigint)` return.
//!
//! Invariant: the value is exact or refused. Non-goal: arithmetic.
//!
//! Binary format as in Postgres' `src/backend/utils/adt/numeric.c`, `numeric_send`: number of base-10000 digits, weight of
//! the first, sign, display scale, digits; each 16 bits.

use std::error::Error;

use tokio_postgres::types::{FromSql, Type};

/// A `numeric`, in millionths rounded towards zero: enough for cents and their averages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Numeric {
    millionths: i128,
}

impl Numeric {
    /// The nearest whole number, halves away from zero.
    pub fn rounded(self) -> i64 {
        let half = if self.millionths < 0 { -500_000 } else { 500_000 };
        i64::try_from((self.millionths + half) / 1_000_000).unwrap_or(i64::MAX)
    }
}

impl<'a> FromSql<'a> for Numeric {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let mut words = raw.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        let mut header = || words.next().ok_or("a numeric shorter than its header");
        let (count, weight, sign, _scale) = (header()?, header()? as i16, header()?, header()?);
        let mut millionths: i128 = 0;
        for index in 0..count {
            let digit = i128::from(words.next().ok_or("a numeric shorter than its digits")?);
            // Position of this base-10000 digit relative to one millionth, in powers of ten.
            let power = 4 * (i32::from(weight) - i32::from(index)) + 6;
            let part = match power {
                0.. => 10_i128.checked_pow(power as u32).and_then(|scale| digit.checked_mul(scale)),
                -3..=-1 => Some(digit / 10_i128.pow((-power) as u32)),
                _ => Some(0),
            };
            millionths = part.and_then(|part| millionths.checked_add(part)).ok_or("a numeric beyond 128 bits")?;
        }
        match sign {
            0x0000 => Ok(Self { millionths }),
            0x4000 => Ok(Self { millionths: -millionths }),
            _ => Err("a numeric that is not a finite number".into()),
        }
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::NUMERIC
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[u16]) -> Result<i64, String> {
        let raw: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        Numeric::from_sql(&Type::NUMERIC, &raw).map(Numeric::rounded).map_err(|error| error.to_string())
    }

    #[test]
    fn numbers_as_postgres_sends_them() {
        assert_eq!(read(&[0, 0, 0, 0]), Ok(0));
        assert_eq!(read(&[1, 0, 0, 0, 42]), Ok(42));
        assert_eq!(read(&[2, 1, 0x4000, 0, 12, 3456]), Ok(-123_456));
        // 10000 is one digit of weight 1; 2833.3333333333333333 is what avg() makes of 8500 / 3.
        assert_eq!(read(&[1, 1, 0, 0, 1]), Ok(10_000));
        assert_eq!(read(&[5, 0, 0, 16, 2833, 3333, 3333, 3333, 3333]), Ok(2833));
        assert_eq!(read(&[2, 0, 0, 1, 2, 5000]), Ok(3));
        assert_eq!(read(&[1, u16::MAX, 0, 4, 5000]), Ok(1));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        assert!(read(&[0, 0, 0xC000, 0]).is_err());
        assert!(read(&[3, 0, 0, 0, 1]).is_err());
        assert!(read(&[1, 0]).is_err());
        assert!(read(&[1, 100, 0, 0, 9999]).is_err());
    }
}
