//! Expressions over aggregates as [`Formula`]s: the few operations that can be reproduced, or nothing.
//!
//! Invariant: aggregates are met in the order in which they are written. Non-goal: types, which nobody knows here; whoever
//! computes a formula derives them and refuses what does not fit.

use sqlparser::ast::{
    BinaryOperator, CastKind, DataType, ExactNumberInfo, Expr, Function, FunctionArg, FunctionArgExpr,
    FunctionArguments, UnaryOperator, Value,
};

use super::scope::name_parts;
use super::terms::{bare, constant};
use crate::sql::facts::{Formula, Literal, Operation, Term};

/// Deeper expressions are left to a server.
const DEPTH_MAX: usize = 24;

/// Reads an expression; `leaf` knows its aggregates and columns. Parameters up to `params` are the client's.
pub fn formula(expr: &Expr, params: u16, leaf: &dyn Fn(&Expr) -> Option<Formula>) -> Option<Formula> {
    Reader { params, leaf }.read(expr, 0)
}

struct Reader<'l> {
    params: u16,
    leaf: &'l dyn Fn(&Expr) -> Option<Formula>,
}

impl Reader<'_> {
    fn read(&self, expr: &Expr, depth: usize) -> Option<Formula> {
        if depth > DEPTH_MAX {
            return None;
        }
        let expr = bare(expr);
        if let Some(leaf) = (self.leaf)(expr) {
            return Some(leaf);
        }
        let apply = |operation, parts: &[&Expr]| {
            let parts = parts.iter().map(|part| self.read(part, depth + 1)).collect::<Option<_>>()?;
            Some(Formula::Apply(operation, parts))
        };
        match expr {
            Expr::Value(value) => self.number(expr, &value.value),
            Expr::UnaryOp { op: UnaryOperator::Minus, expr } => apply(Operation::Negate, &[expr]),
            Expr::UnaryOp { op: UnaryOperator::Not, expr } => apply(Operation::Not, &[expr]),
            Expr::BinaryOp { left, op, right } => apply(binary(op)?, &[left, right]),
            Expr::IsNull(inner) => apply(Operation::IsNull, &[inner]),
            Expr::IsNotNull(inner) => apply(Operation::IsNotNull, &[inner]),
            Expr::Function(function) => {
                let (operation, parts) = call(function)?;
                apply(operation, &parts)
            }
            Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr, data_type, format: None } => {
                apply(conversion(data_type)?, &[expr])
            }
            _ => None,
        }
    }

    fn number(&self, expr: &Expr, value: &Value) -> Option<Formula> {
        if matches!(value, Value::Null) {
            return Some(Formula::Constant(Term::Null));
        }
        let term = constant(expr)?.term;
        match &term {
            Term::Param { number, negated: false } if *number > self.params => {}
            Term::Literal(Literal::Number(_)) => {}
            _ => return None,
        }
        Some(Formula::Constant(term))
    }
}

fn binary(operator: &BinaryOperator) -> Option<Operation> {
    Some(match operator {
        BinaryOperator::Plus => Operation::Add,
        BinaryOperator::Minus => Operation::Subtract,
        BinaryOperator::Multiply => Operation::Multiply,
        BinaryOperator::Divide => Operation::Divide,
        BinaryOperator::Eq => Operation::Equal,
        BinaryOperator::NotEq => Operation::NotEqual,
        BinaryOperator::Lt => Operation::Less,
        BinaryOperator::LtEq => Operation::LessEqual,
        BinaryOperator::Gt => Operation::Greater,
        BinaryOperator::GtEq => Operation::GreaterEqual,
        BinaryOperator::And => Operation::And,
        BinaryOperator::Or => Operation::Or,
        _ => return None,
    })
}

fn call(function: &Function) -> Option<(Operation, Vec<&Expr>)> {
    let parts = name_parts(&function.name)?;
    let [name] = parts.as_slice() else { return None };
    let FunctionArguments::List(list) = &function.args else { return None };
    let plain = function.over.is_none()
        && function.filter.is_none()
        && function.within_group.is_empty()
        && list.clauses.is_empty()
        && list.duplicate_treatment.is_none();
    let argument = |argument| match argument {
        &FunctionArg::Unnamed(FunctionArgExpr::Expr(ref expr)) => Some(expr),
        _ => None,
    };
    let arguments = list.args.iter().map(argument).collect::<Option<Vec<_>>>().filter(|_| plain)?;
    let operation = match (name.as_str(), arguments.len()) {
        ("coalesce", 1..) => Operation::Coalesce,
        ("nullif", 2) => Operation::NullIf,
        ("round", 1 | 2) => Operation::Round,
        _ => return None,
    };
    Some((operation, arguments))
}

/// Casts to a type without length or scale.
fn conversion(data_type: &DataType) -> Option<Operation> {
    Some(match data_type {
        DataType::Int2(None) | DataType::SmallInt(None) => Operation::ToInt2,
        DataType::Int(None) | DataType::Integer(None) | DataType::Int4(None) => Operation::ToInt4,
        DataType::BigInt(None) | DataType::Int8(None) => Operation::ToInt8,
        DataType::Numeric(ExactNumberInfo::None) | DataType::Decimal(ExactNumberInfo::None) => Operation::ToNumeric,
        _ => return None,
    })
}
