//! Values that stand where a key stands, and the conditions that bind a column to them.

use sqlparser::ast::{BinaryOperator, CastKind, CharacterLength, DataType, Expr, UnaryOperator, Value};

use crate::sql::facts::{KeySet, Literal, Term};
use crate::topology::KeyType;

/// A constant, with the type family a cast gives it (`None`: whatever it is compared with).
#[derive(Clone, Debug)]
pub struct Constant {
    pub term: Term,
    pub cast: Option<KeyType>,
}

/// Takes redundant parentheses off.
pub fn bare(expr: &Expr) -> &Expr {
    let mut expr = expr;
    while let Expr::Nested(inner) = expr {
        expr = inner;
    }
    expr
}

/// The key family of a type without length; a length could cut the value.
fn cast_family(data_type: &DataType) -> Option<KeyType> {
    match data_type {
        DataType::BigInt(None)
        | DataType::Int8(None)
        | DataType::Int(None)
        | DataType::Integer(None)
        | DataType::Int4(None)
        | DataType::Int2(None)
        | DataType::SmallInt(None) => Some(KeyType::Int),
        DataType::Text => Some(KeyType::Text),
        DataType::Varchar(None) | DataType::CharacterVarying(None::<CharacterLength>) => Some(KeyType::Text),
        DataType::Uuid => Some(KeyType::Uuid),
        _ => None,
    }
}

fn array_family(data_type: &DataType) -> Option<KeyType> {
    use sqlparser::ast::ArrayElemTypeDef::SquareBracket;
    match data_type {
        DataType::Array(SquareBracket(element, _)) => cast_family(element),
        _ => None,
    }
}

/// The number of a `$n` placeholder.
fn param(text: &str) -> Option<u16> {
    text.strip_prefix('$')?.parse().ok().filter(|&number| number > 0)
}

fn value_term(value: &Value) -> Option<Term> {
    match value {
        Value::Placeholder(text) => Some(Term::Param { number: param(text)?, negated: false }),
        Value::Number(text, false) => Some(Term::Literal(Literal::Number(text.as_str().into()))),
        Value::SingleQuotedString(text) => Some(Term::Literal(Literal::String(text.as_str().into()))),
        Value::Null => Some(Term::Null),
        _ => None,
    }
}

/// The constant an expression is, if it is one whose value weir can know.
pub fn constant(expr: &Expr) -> Option<Constant> {
    match bare(expr) {
        Expr::Value(value) => Some(Constant { term: value_term(&value.value)?, cast: None }),
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => {
            let Expr::Value(value) = bare(expr) else { return None };
            let term = match value_term(&value.value)? {
                Term::Param { number, .. } => Term::Param { number, negated: true },
                Term::Literal(Literal::Number(text)) => Term::Literal(Literal::Number(format!("-{text}").into())),
                _ => return None,
            };
            Some(Constant { term, cast: None })
        }
        Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr, data_type, format: None } => {
            let family = cast_family(data_type)?;
            let inner = constant(expr)?;
            if inner.cast.is_some_and(|cast| cast != family) || negated(&inner.term) {
                return None;
            }
            Some(Constant { term: inner.term, cast: Some(family) })
        }
        Expr::TypedString(typed) => {
            let family = cast_family(&typed.data_type)?;
            Some(Constant { term: value_term(&typed.value.value)?, cast: Some(family) })
        }
        _ => None,
    }
}

// `-$1::text` is `-($1::text)`; what a minus does to a value of unknown type is the server's business.
fn negated(term: &Term) -> bool {
    matches!(term, Term::Param { negated: true, .. })
}

/// The right side of `= ANY (…)`.
pub fn any_constants(expr: &Expr) -> Option<Vec<Constant>> {
    match bare(expr) {
        Expr::Array(array) => array.elem.iter().map(constant).collect(),
        Expr::Value(value) => match value_term(&value.value)? {
            Term::Param { number, .. } => Some(vec![Constant { term: Term::Array { number }, cast: None }]),
            Term::Literal(Literal::String(text)) => {
                Some(vec![Constant { term: Term::ArrayLiteral(text), cast: None }])
            }
            _ => None,
        },
        Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr, data_type, format: None } => {
            let family = array_family(data_type)?;
            let inner = any_constants(expr)?;
            if inner.iter().any(|constant| constant.cast.is_some_and(|cast| cast != family)) {
                return None;
            }
            Some(inner.into_iter().map(|constant| Constant { cast: Some(family), ..constant }).collect())
        }
        _ => None,
    }
}

/// A key set out of constants for a column of `family`; `None` if one was cast to another family, or there is none.
pub fn key_set(constants: Vec<Constant>, family: KeyType) -> Option<KeySet> {
    if constants.is_empty() || constants.iter().any(|constant| constant.cast.is_some_and(|cast| cast != family)) {
        return None;
    }
    Some(KeySet { terms: constants.into_iter().map(|constant| constant.term).collect() })
}

/// One condition that must hold, as far as it says something of a column.
pub enum Condition<'e> {
    Equal(&'e Expr, &'e Expr),
    OneOf(&'e Expr, Vec<Constant>),
    Either(&'e Expr, &'e Expr),
}

/// Splits a condition into what must all hold, and hands each part that can bind a column to `found`.
pub fn conditions<'e>(expr: &'e Expr, found: &mut impl FnMut(Condition<'e>)) {
    match bare(expr) {
        Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
            conditions(left, found);
            conditions(right, found);
        }
        Expr::BinaryOp { left, op: BinaryOperator::Or, right } => found(Condition::Either(left, right)),
        Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => equal(left, right, found),
        Expr::InList { expr, list, negated: false } => in_list(expr, list, found),
        Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => {
            if let Some(constants) = any_constants(right) {
                found(Condition::OneOf(bare(left), constants));
            }
        }
        _ => {}
    }
}

fn equal<'e>(left: &'e Expr, right: &'e Expr, found: &mut impl FnMut(Condition<'e>)) {
    let (left, right) = (bare(left), bare(right));
    if let (Expr::Tuple(left), Expr::Tuple(right)) = (left, right) {
        if left.len() == right.len() {
            for (left, right) in left.iter().zip(right) {
                equal(left, right, found);
            }
        }
        return;
    }
    match (constant(left), constant(right)) {
        (None, Some(constant)) => found(Condition::OneOf(left, vec![constant])),
        (Some(constant), None) => found(Condition::OneOf(right, vec![constant])),
        (None, None) => found(Condition::Equal(left, right)),
        (Some(_), Some(_)) => {}
    }
}

fn in_list<'e>(expr: &'e Expr, list: &'e [Expr], found: &mut impl FnMut(Condition<'e>)) {
    let Expr::Tuple(columns) = bare(expr) else {
        if let Some(constants) = list.iter().map(constant).collect() {
            found(Condition::OneOf(bare(expr), constants));
        }
        return;
    };
    for (index, column) in columns.iter().enumerate() {
        let constants: Option<Vec<Constant>> = list
            .iter()
            .map(|row| match bare(row) {
                Expr::Tuple(values) if values.len() == columns.len() => constant(&values[index]),
                _ => None,
            })
            .collect();
        if let Some(constants) = constants {
            found(Condition::OneOf(bare(column), constants));
        }
    }
}
