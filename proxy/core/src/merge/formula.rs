//! Expressions over folded values: `sum(a) / count(*)`, `coalesce(sum(x), 0)`, HAVING.
//!
//! Invariant: types are derived as Postgres derives them (parse_coerce.c, pg_operator.dat), and the derived type of a shown
//! value must be the one the shards describe, or the statement is refused; values are computed exactly (int.c, int8.c,
//! numeric.c). Non-goals: floats, text, dates, NaN and infinities.

use std::cmp::Ordering;

use super::numeric::Numeric;
use super::row::Row;
use super::value::{self, Kind};
use super::{ResultColumn, unsupported};
use crate::error::{Blame, UserError};
use crate::sql::facts::Operation;

const OUT_OF_RANGE: &str = "22003";
const DIVISION_BY_ZERO: &str = "22012";
/// More fractional digits than this are not asked of round().
const ROUND_DIGITS_MAX: i128 = 1000;

/// What is to be computed from the columns of a folded row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Formula {
    /// A 0-based column of the shards' rows.
    Column(usize),
    /// A number as it was written, without a sign.
    Number(Box<str>),
    Null,
    Apply(Operation, Vec<Formula>),
}

impl Formula {
    /// The columns it is computed from.
    pub(super) fn columns(&self) -> Vec<usize> {
        match self {
            Formula::Column(column) => vec![*column],
            Formula::Number(_) | Formula::Null => Vec::new(),
            Formula::Apply(_, parts) => parts.iter().flat_map(Formula::columns).collect(),
        }
    }
}

/// Types in the order in which one gives way to the next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Type {
    Bool,
    Int2,
    Int4,
    Int8,
    Numeric,
}

#[derive(Clone, PartialEq, Debug)]
enum Scalar {
    Bool(bool),
    Int(i128),
    Numeric(Numeric),
}

/// A formula whose types are known. A type of `None` is that of a bare NULL.
pub(super) struct Computed {
    node: Node,
    kind: Option<Type>,
}

enum Node {
    Column { column: usize, kind: Kind, binary: bool },
    Constant(Option<Scalar>),
    Apply(Operation, Vec<Computed>),
}

impl Computed {
    /// A value that is shown in `column`. Fails (0A000) where it is not of that column's type.
    pub(super) fn shown(formula: &Formula, column: usize, columns: &[ResultColumn]) -> Result<Self, UserError> {
        let described = columns[column].type_oid;
        Self::new(formula, columns)
            .filter(|computed| computed.kind.is_some_and(|kind| kind.oid() == described))
            .ok_or_else(|| unsupported("an expression over aggregates", column, described))
    }

    /// A condition. Fails (0A000) where weir cannot tell its type.
    pub(super) fn condition(formula: &Formula, columns: &[ResultColumn]) -> Result<Self, UserError> {
        Self::new(formula, columns)
            .filter(|computed| computed.kind == Some(Type::Bool))
            .ok_or_else(|| unsupported("HAVING", 0, columns.first().map_or(0, |column| column.type_oid)))
    }

    fn new(formula: &Formula, columns: &[ResultColumn]) -> Option<Self> {
        let (node, kind) = match formula {
            Formula::Null => (Node::Constant(None), None),
            Formula::Number(text) => {
                let (value, kind) = number(text)?;
                (Node::Constant(Some(value)), Some(kind))
            }
            Formula::Column(column) => {
                let ResultColumn { type_oid, binary, .. } = columns[*column];
                let kind = Kind::of(type_oid)?;
                (Node::Column { column: *column, kind, binary }, Some(Type::of(kind)?))
            }
            Formula::Apply(operation, parts) => {
                let parts: Vec<Computed> =
                    parts.iter().map(|part| Computed::new(part, columns)).collect::<Option<_>>()?;
                let kind = derived(*operation, &parts)?;
                (Node::Apply(*operation, parts), Some(kind))
            }
        };
        Some(Computed { node, kind })
    }

    /// Is the condition true? (Neither false nor null.)
    pub(super) fn holds(&self, row: &Row<'_>) -> Result<bool, UserError> {
        Ok(self.value(row)? == Some(Scalar::Bool(true)))
    }

    /// The value in the format of its column; `None` is null.
    pub(super) fn write(&self, row: &Row<'_>, binary: bool) -> Result<Option<Vec<u8>>, UserError> {
        let Some(value) = self.value(row)? else { return Ok(None) };
        let bytes = match value {
            Scalar::Bool(value) if binary => vec![u8::from(value)],
            Scalar::Bool(value) => if value { b"t" } else { b"f" }.to_vec(),
            Scalar::Numeric(value) if binary => value.to_binary().ok_or_else(|| out_of_range(Type::Numeric))?,
            Scalar::Numeric(value) => value.to_text().into_bytes(),
            Scalar::Int(value) if !binary => value.to_string().into_bytes(),
            Scalar::Int(value) => match self.kind {
                Some(Type::Int2) => (value as i16).to_be_bytes().to_vec(),
                Some(Type::Int4) => (value as i32).to_be_bytes().to_vec(),
                _ => (value as i64).to_be_bytes().to_vec(),
            },
        };
        Ok(Some(bytes))
    }

    fn value(&self, row: &Row<'_>) -> Result<Option<Scalar>, UserError> {
        match &self.node {
            Node::Constant(value) => Ok(value.clone()),
            Node::Column { column, kind, binary } => {
                row.get(*column).map(|value| read(*kind, *binary, value)).transpose()
            }
            Node::Apply(operation, parts) => self.apply(*operation, parts, row),
        }
    }

    fn apply(&self, operation: Operation, parts: &[Computed], row: &Row<'_>) -> Result<Option<Scalar>, UserError> {
        let kind = self.kind.unwrap_or(Type::Bool);
        let part = |at: usize| parts[at].value(row);
        match operation {
            Operation::And | Operation::Or => either(operation == Operation::Or, part(0)?, || part(1)),
            Operation::Not => Ok(part(0)?.map(|value| Scalar::Bool(value == Scalar::Bool(false)))),
            Operation::IsNull => Ok(Some(Scalar::Bool(part(0)?.is_none()))),
            Operation::IsNotNull => Ok(Some(Scalar::Bool(part(0)?.is_some()))),
            Operation::Coalesce => {
                for part in parts {
                    if let Some(value) = part.value(row)? {
                        return Ok(Some(widened(value, kind)));
                    }
                }
                Ok(None)
            }
            Operation::NullIf => {
                let (left, right) = (part(0)?, part(1)?);
                let equal =
                    left.as_ref().zip(right.as_ref()).is_some_and(|(left, right)| compared(left, right).is_eq());
                Ok(if equal { None } else { left.map(|value| widened(value, kind)) })
            }
            _ => {
                let mut values = Vec::with_capacity(parts.len());
                for part in parts {
                    match part.value(row)? {
                        Some(value) => values.push(value),
                        None => return Ok(None),
                    }
                }
                strict(operation, &values, kind).map(Some)
            }
        }
    }
}

impl Type {
    fn of(kind: Kind) -> Option<Self> {
        Some(match kind {
            Kind::Bool => Type::Bool,
            Kind::Int { bytes: 2 } => Type::Int2,
            Kind::Int { bytes: 4 } => Type::Int4,
            Kind::Int { bytes: 8 } => Type::Int8,
            Kind::Numeric => Type::Numeric,
            _ => return None,
        })
    }

    fn oid(self) -> u32 {
        match self {
            Type::Bool => 16,
            Type::Int2 => 21,
            Type::Int4 => 23,
            Type::Int8 => 20,
            Type::Numeric => 1700,
        }
    }

    fn is_number(self) -> bool {
        self != Type::Bool
    }
}

/// The type of an operation's result; `None`: not one that is reproduced.
fn derived(operation: Operation, parts: &[Computed]) -> Option<Type> {
    let kinds: Vec<Option<Type>> = parts.iter().map(|part| part.kind).collect();
    let numbers = || kinds.iter().all(|kind| kind.is_some_and(Type::is_number));
    let widest = kinds.iter().flatten().max().copied();
    match operation {
        Operation::IsNull | Operation::IsNotNull => Some(Type::Bool),
        Operation::And | Operation::Or | Operation::Not => {
            kinds.iter().all(|kind| *kind == Some(Type::Bool)).then_some(Type::Bool)
        }
        Operation::Negate | Operation::Add | Operation::Subtract | Operation::Multiply | Operation::Divide => {
            widest.filter(|_| numbers())
        }
        Operation::Equal
        | Operation::NotEqual
        | Operation::Less
        | Operation::LessEqual
        | Operation::Greater
        | Operation::GreaterEqual => numbers().then_some(Type::Bool),
        Operation::Coalesce => {
            widest.filter(|widest| kinds.iter().flatten().all(|kind| kind.is_number() == widest.is_number()))
        }
        // nullif(int8, int4) compares as they are, with a numeric both become one.
        Operation::NullIf => {
            let numeric = widest == Some(Type::Numeric);
            if numeric { widest.filter(|_| numbers()) } else { kinds[0].filter(|_| numbers()) }
        }
        Operation::Round => match parts {
            [only] => only.kind.filter(|kind| *kind == Type::Numeric),
            [_, Computed { node: Node::Constant(Some(Scalar::Int(0..=ROUND_DIGITS_MAX))), kind: Some(Type::Int4) }] => {
                numbers().then_some(Type::Numeric)
            }
            _ => None,
        },
        Operation::ToInt2 => numbers().then_some(Type::Int2),
        Operation::ToInt4 => numbers().then_some(Type::Int4),
        Operation::ToInt8 => numbers().then_some(Type::Int8),
        Operation::ToNumeric => numbers().then_some(Type::Numeric),
    }
}

/// An unsigned number as the scanner reads it: the narrowest of int4, int8, numeric.
fn number(text: &str) -> Option<(Scalar, Type)> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= 18 {
        let value: i128 = text.parse().ok()?;
        return Some((Scalar::Int(value), if i32::try_from(value).is_ok() { Type::Int4 } else { Type::Int8 }));
    }
    let plain = text.len() <= 100 && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let value = Numeric::read(text.as_bytes()).filter(|_| plain && text.contains('.'))?;
    Some((Scalar::Numeric(value), Type::Numeric))
}

fn read(kind: Kind, binary: bool, bytes: &[u8]) -> Result<Scalar, UserError> {
    let found = match kind {
        Kind::Bool => value::boolean(binary, bytes).map(Scalar::Bool),
        Kind::Numeric => value::decimal(binary, bytes).map(|decimal| Scalar::Numeric(decimal.into())),
        _ => value::integer(kind, binary, bytes).map(|value| Scalar::Int(value.into())),
    };
    match found {
        Some(Scalar::Numeric(value)) if !value.is_finite() => Err(unsupported("NaN or infinity", 0, 1700)),
        Some(value) => Ok(value),
        None => Err(unsupported("a value", 0, 0)),
    }
}

/// Three-valued AND and OR, from left to right.
fn either(
    or: bool,
    left: Option<Scalar>,
    right: impl FnOnce() -> Result<Option<Scalar>, UserError>,
) -> Result<Option<Scalar>, UserError> {
    if left == Some(Scalar::Bool(or)) {
        return Ok(left);
    }
    let right = right()?;
    Ok(if right == Some(Scalar::Bool(or)) || left.is_some() { right } else { None })
}

fn widened(value: Scalar, kind: Type) -> Scalar {
    match (value, kind) {
        (Scalar::Int(value), Type::Numeric) => Scalar::Numeric(Numeric::from(value)),
        (value, _) => value,
    }
}

fn numeric(value: &Scalar) -> Numeric {
    match value {
        Scalar::Numeric(value) => value.clone(),
        Scalar::Int(value) => Numeric::from(*value),
        Scalar::Bool(value) => Numeric::from(i128::from(*value)),
    }
}

fn compared(left: &Scalar, right: &Scalar) -> Ordering {
    match (left, right) {
        (Scalar::Int(left), Scalar::Int(right)) => left.cmp(right),
        _ => numeric(left).compare(&numeric(right)),
    }
}

/// Operations that are null if a part is.
fn strict(operation: Operation, values: &[Scalar], kind: Type) -> Result<Scalar, UserError> {
    let ordering = || compared(&values[0], &values[1]);
    let truth = match operation {
        Operation::Equal => ordering().is_eq(),
        Operation::NotEqual => ordering().is_ne(),
        Operation::Less => ordering().is_lt(),
        Operation::LessEqual => ordering().is_le(),
        Operation::Greater => ordering().is_gt(),
        Operation::GreaterEqual => ordering().is_ge(),
        _ if kind == Type::Numeric => return decimal(operation, values).map(Scalar::Numeric),
        _ => return integer(operation, values, kind).map(Scalar::Int),
    };
    Ok(Scalar::Bool(truth))
}

fn decimal(operation: Operation, values: &[Scalar]) -> Result<Numeric, UserError> {
    let (mut left, right) = (numeric(&values[0]), values.get(1).map(numeric));
    let right = right.unwrap_or_else(|| Numeric::from(0));
    let found = match operation {
        Operation::Negate => Some(left.negated()),
        Operation::Add => {
            left.add(right);
            Some(left)
        }
        Operation::Subtract => {
            left.add(right.negated());
            Some(left)
        }
        Operation::Multiply => left.times(&right),
        Operation::Divide if right.is_zero() => return Err(division_by_zero()),
        Operation::Divide => left.over(&right),
        Operation::Round => {
            let digits = match values.get(1) {
                Some(Scalar::Int(digits)) => *digits as u16,
                _ => 0,
            };
            left.rounded(digits)
        }
        Operation::ToNumeric => Some(left),
        _ => None,
    };
    found.ok_or_else(|| out_of_range(Type::Numeric))
}

fn integer(operation: Operation, values: &[Scalar], kind: Type) -> Result<i128, UserError> {
    let whole = |value: &Scalar| match value {
        Scalar::Int(value) => Some(*value),
        Scalar::Bool(_) => None,
        Scalar::Numeric(value) => value.rounded(0)?.to_text().parse().ok(),
    };
    let left = whole(&values[0]).ok_or_else(|| out_of_range(kind))?;
    let right = values.get(1).and_then(whole).unwrap_or(0);
    // Parts fit into int8, so that none of these overflows.
    let found = match operation {
        Operation::Negate => -left,
        Operation::Add => left + right,
        Operation::Subtract => left - right,
        Operation::Multiply => left * right,
        Operation::Divide if right == 0 => return Err(division_by_zero()),
        Operation::Divide => left / right,
        _ => left,
    };
    let fits = match kind {
        Type::Int2 => i16::try_from(found).is_ok(),
        Type::Int4 => i32::try_from(found).is_ok(),
        _ => i64::try_from(found).is_ok(),
    };
    if fits { Ok(found) } else { Err(out_of_range(kind)) }
}

fn out_of_range(kind: Type) -> UserError {
    let message = match kind {
        Type::Int2 => "smallint out of range",
        Type::Int4 => "integer out of range",
        Type::Bool | Type::Int8 => "bigint out of range",
        Type::Numeric => "value overflows numeric format",
    };
    UserError::new(Blame::Client, OUT_OF_RANGE, message)
}

fn division_by_zero() -> UserError {
    UserError::new(Blame::Client, DIVISION_BY_ZERO, "division by zero")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::row::RowBuilder;

    /// Columns: int8, numeric, int4, bool.
    const COLUMNS: [u32; 4] = [20, 1700, 23, 16];

    fn value(formula: &Formula, values: [Option<&str>; 4], shown: u32) -> Result<Option<String>, UserError> {
        let mut columns = COLUMNS
            .map(|type_oid| ResultColumn { type_oid, type_modifier: -1, binary: false, rounded: false })
            .to_vec();
        columns.push(ResultColumn { type_oid: shown, type_modifier: -1, binary: false, rounded: false });
        let mut builder = RowBuilder::new(5);
        for value in values {
            builder.push(value.map(str::as_bytes));
        }
        builder.push(None);
        let body = builder.finish();
        let computed = Computed::shown(formula, 4, &columns)?;
        let bytes = computed.write(&Row::parse(&body, 5)?, false)?;
        Ok(bytes.map(|bytes| String::from_utf8(bytes).expect("text")))
    }

    fn apply(operation: Operation, parts: &[Formula]) -> Formula {
        Formula::Apply(operation, parts.to_vec())
    }

    fn number(text: &str) -> Formula {
        Formula::Number(text.into())
    }

    const ROW: [Option<&str>; 4] = [Some("7"), Some("2.50"), Some("-3"), None];

    #[test]
    fn values_and_types_are_those_of_postgres() {
        use Operation::*;
        let (big, num, int) = (Formula::Column(0), Formula::Column(1), Formula::Column(2));
        for (formula, shown, expected) in [
            (apply(Divide, &[big.clone(), number("2")]), 20, Some("3")),
            (apply(Divide, &[int.clone(), number("2")]), 23, Some("-1")),
            (apply(Divide, &[num.clone(), big.clone()]), 1700, Some("0.35714285714285714286")),
            (apply(Divide, &[number("100.0"), num.clone()]), 1700, Some("40.0000000000000000")),
            (apply(Multiply, &[num.clone(), num.clone()]), 1700, Some("6.2500")),
            (apply(Subtract, &[big.clone(), num.clone()]), 1700, Some("4.50")),
            (apply(Round, std::slice::from_ref(&num)), 1700, Some("3")),
            (apply(Round, &[apply(Negate, std::slice::from_ref(&num)), number("1")]), 1700, Some("-2.5")),
            (apply(Round, &[big.clone(), number("2")]), 1700, Some("7.00")),
            (apply(ToInt4, std::slice::from_ref(&num)), 23, Some("3")),
            (apply(ToNumeric, std::slice::from_ref(&int)), 1700, Some("-3")),
            (apply(Coalesce, &[Formula::Column(3), apply(Less, &[int.clone(), number("0")])]), 16, Some("t")),
            (apply(Coalesce, &[int.clone(), num.clone()]), 1700, Some("-3")),
            (apply(NullIf, &[big.clone(), number("7")]), 20, None),
            (apply(NullIf, &[big.clone(), number("7.0")]), 1700, None),
            (apply(And, &[Formula::Column(3), apply(Equal, &[big.clone(), number("8")])]), 16, Some("f")),
            (apply(Or, &[Formula::Column(3), apply(Equal, &[big.clone(), number("8")])]), 16, None),
            (apply(Not, &[Formula::Column(3)]), 16, None),
            (apply(IsNull, &[Formula::Column(3)]), 16, Some("t")),
        ] {
            assert_eq!(value(&formula, ROW, shown).expect("computed").as_deref(), expected, "{formula:?}");
        }
    }

    #[test]
    fn what_is_not_reproduced_is_refused() {
        use Operation::*;
        let (big, num) = (Formula::Column(0), Formula::Column(1));
        let code = |formula: &Formula, shown| value(formula, ROW, shown).expect_err("refused").sqlstate;
        // round(int8) is round(double precision).
        assert_eq!(code(&apply(Round, std::slice::from_ref(&big)), 1700), "0A000");
        assert_eq!(code(&apply(Add, &[big.clone(), Formula::Null]), 20), "0A000");
        assert_eq!(code(&apply(Add, &[big.clone(), number("1e3")]), 1700), "0A000");
        // Described otherwise than derived.
        assert_eq!(code(&apply(Add, &[num, number("1")]), 701), "0A000");
        assert_eq!(code(&apply(Divide, &[big.clone(), number("0")]), 20), "22012");
        let large = number("9000000000000000000");
        assert_eq!(code(&apply(Add, &[big, large]), 1700), "0A000", "nineteen digits are left alone");
        let four = apply(Multiply, &[Formula::Column(2), number("2000000000")]);
        assert_eq!(code(&four, 23), "22003");
    }
}
