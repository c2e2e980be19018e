//! Folding the partial aggregates of several shards into the one Postgres would have computed over all rows.
//!
//! Invariants: a column type that cannot be folded as Postgres folds it is refused before the first row; the answer does not depend
//! on the order in which shards answer (sums are kept wide and checked at the end, parts of floats are added in the order of the
//! shards, ties go to the lowest source). All folds are exact but those of floats, which are what a parallel plan of Postgres makes
//! of the parts of its workers (docs/decisions/0007).

use super::float;
use super::numeric::{Decimal, Numeric};
use super::row::Row;
use super::value::{self, Comparable, Kind};
use super::{Fold, FoldKind, ResultColumn, unsupported};
use crate::error::{Blame, UserError, sqlstate};

/// numeric_value_out_of_range.
const OUT_OF_RANGE: &str = "22003";

/// A fold whose column types are known to be exact.
pub(super) struct Folder {
    /// Where the result goes.
    pub(super) column: usize,
    binary: bool,
    rule: Rule,
}

/// Where numbers to be added come from.
#[derive(Clone, Copy)]
struct Source {
    column: usize,
    kind: Kind,
    binary: bool,
}

enum Rule {
    Count(Source),
    SumInt8(Source),
    SumNumeric(Source),
    Extreme { by: Comparable },
    AvgNumeric { sum: Source, count: Source },
    SumFloat(Source),
    AvgFloat { sum: Source, count: Source },
    Bool { column: usize, and: bool },
}

/// The fold of one group so far.
pub(super) enum State {
    Integer(Option<i128>),
    Numeric {
        sum: Option<Numeric>,
        count: i128,
    },
    Extreme(Option<Extreme>),
    Bool(Option<bool>),
    /// Sums and counts by source.
    Floats(Vec<(usize, f64, i128)>),
}

pub(super) struct Extreme {
    key: Vec<u8>,
    value: Vec<u8>,
    source: usize,
}

impl Folder {
    /// Fails (0A000) for types whose fold weir cannot make exact.
    pub(super) fn new(fold: Fold, columns: &[ResultColumn]) -> Result<Self, UserError> {
        let result = &columns[fold.column];
        let source = |column: usize| {
            let binary = columns[column].binary;
            columns[column].kind().map(|kind| Source { column, kind, binary })
        };
        let refuse = |what: &str| unsupported(what, fold.column, result.type_oid);
        let own = source(fold.column).ok_or_else(|| refuse("aggregate"))?;
        let is_count = |source: &Source| source.kind == Kind::Int { bytes: 8 };
        let rule = match fold.kind {
            FoldKind::Count if is_count(&own) => Rule::Count(own),
            FoldKind::Sum => match own.kind {
                Kind::Int { bytes: 8 } => Rule::SumInt8(own),
                Kind::Numeric => Rule::SumNumeric(own),
                Kind::Float4 | Kind::Float8 => Rule::SumFloat(own),
                _ => return Err(refuse("sum")),
            },
            FoldKind::Min { byte_order } | FoldKind::Max { byte_order } if byte_order || !own.kind.is_collated() => {
                let Source { column, kind, binary } = own;
                let descending = matches!(fold.kind, FoldKind::Max { .. });
                Rule::Extreme { by: Comparable { column, kind, binary, descending, nulls_first: false } }
            }
            FoldKind::Avg { sum, count } => {
                let (sum, count) =
                    source(sum).zip(source(count)).filter(|(_, count)| is_count(count)).ok_or_else(|| refuse("avg"))?;
                match (own.kind, sum.kind) {
                    (Kind::Numeric, Kind::Int { .. } | Kind::Numeric) => Rule::AvgNumeric { sum, count },
                    (Kind::Float8, Kind::Float8) => Rule::AvgFloat { sum, count },
                    _ => return Err(refuse("avg")),
                }
            }
            FoldKind::And | FoldKind::Or if own.kind == Kind::Bool => {
                Rule::Bool { column: own.column, and: fold.kind == FoldKind::And }
            }
            _ => return Err(refuse("aggregate")),
        };
        Ok(Folder { column: fold.column, binary: own.binary, rule })
    }

    pub(super) fn start(&self) -> State {
        match self.rule {
            Rule::Count(_) => State::Integer(Some(0)),
            Rule::SumInt8(_) => State::Integer(None),
            Rule::SumNumeric(_) | Rule::AvgNumeric { .. } => State::Numeric { sum: None, count: 0 },
            Rule::Extreme { .. } => State::Extreme(None),
            Rule::Bool { .. } => State::Bool(None),
            Rule::SumFloat(_) | Rule::AvgFloat { .. } => State::Floats(Vec::new()),
        }
    }

    /// Adds one shard's part. Nulls add nothing.
    pub(super) fn add(&self, state: &mut State, source: usize, row: &Row<'_>) -> Result<(), UserError> {
        match (&self.rule, state) {
            (Rule::Count(part) | Rule::SumInt8(part), State::Integer(total)) => {
                if let Some(value) = part.integer(row)? {
                    *total = Some(total.unwrap_or(0) + value);
                }
            }
            (Rule::SumNumeric(part), State::Numeric { sum, .. }) => add_numeric(sum, part.numeric(row)?),
            (Rule::AvgNumeric { sum: part, count: parts }, State::Numeric { sum, count }) => {
                add_numeric(sum, part.numeric(row)?);
                *count += parts.integer(row)?.unwrap_or(0);
            }
            (Rule::Extreme { by }, State::Extreme(best)) => take_if_better(by, best, source, row)?,
            (Rule::Bool { column, and }, State::Bool(total)) => {
                if let Some(value) = row.get(*column) {
                    let value = value::boolean(self.binary, value).ok_or_else(|| malformed(*column))?;
                    *total = Some(total.map_or(value, |total| if *and { total & value } else { total | value }));
                }
            }
            (Rule::SumFloat(part), State::Floats(parts)) => {
                if let Some(sum) = part.float(row)? {
                    parts.push((source, sum, 1));
                }
            }
            (Rule::AvgFloat { sum, count }, State::Floats(parts)) => {
                if let Some(sum) = sum.float(row)? {
                    parts.push((source, sum, count.integer(row)?.unwrap_or(0)));
                }
            }
            // `start` pairs each rule with its state.
            _ => {}
        }
        Ok(())
    }

    /// The value to show, in the format of its column; `None` is null.
    pub(super) fn finish(&self, state: &State) -> Result<Option<Vec<u8>>, UserError> {
        match state {
            State::Integer(total) => total.map(|total| self.int8(total)).transpose(),
            State::Extreme(best) => Ok(best.as_ref().map(|best| best.value.clone())),
            State::Bool(total) => Ok(total.map(|total| match (self.binary, total) {
                (true, total) => vec![u8::from(total)],
                (false, true) => b"t".to_vec(),
                (false, false) => b"f".to_vec(),
            })),
            State::Floats(parts) => {
                let mut parts = parts.clone();
                parts.sort_unstable_by_key(|part| part.0);
                let parts: Vec<(f64, i128)> = parts.into_iter().map(|(_, sum, count)| (sum, count)).collect();
                Ok(match &self.rule {
                    Rule::SumFloat(Source { kind: Kind::Float4, .. }) => {
                        float::sum4(&parts)?.map(|sum| float::write4(sum, self.binary))
                    }
                    Rule::SumFloat(_) => float::sum8(&parts)?.map(|sum| float::write8(sum, self.binary)),
                    _ => float::average(&parts)?.map(|average| float::write8(average, self.binary)),
                })
            }
            State::Numeric { sum, count } => match (&self.rule, sum) {
                (_, None) => Ok(None),
                (Rule::AvgNumeric { .. }, Some(_)) if *count <= 0 => Ok(None),
                (Rule::AvgNumeric { .. }, Some(sum)) => self.numeric(&sum.divide(*count)).map(Some),
                (_, Some(sum)) => self.numeric(sum).map(Some),
            },
        }
    }

    fn int8(&self, total: i128) -> Result<Vec<u8>, UserError> {
        let total =
            i64::try_from(total).map_err(|_| UserError::new(Blame::Client, OUT_OF_RANGE, "bigint out of range"))?;
        Ok(if self.binary { total.to_be_bytes().to_vec() } else { total.to_string().into_bytes() })
    }

    fn numeric(&self, value: &Numeric) -> Result<Vec<u8>, UserError> {
        if !self.binary {
            return Ok(value.to_text().into_bytes());
        }
        value.to_binary().ok_or_else(|| UserError::new(Blame::Client, OUT_OF_RANGE, "value overflows numeric format"))
    }
}

fn add_numeric(sum: &mut Option<Numeric>, part: Option<Numeric>) {
    match (sum, part) {
        (_, None) => {}
        (Some(sum), Some(part)) => sum.add(part),
        (sum @ None, part) => *sum = part,
    }
}

/// Equal values may look different (1.0, 1.00): the one of the lowest source is shown.
fn take_if_better(by: &Comparable, best: &mut Option<Extreme>, source: usize, row: &Row<'_>) -> Result<(), UserError> {
    let Some(value) = row.get(by.column) else { return Ok(()) };
    let mut key = Vec::new();
    by.append(Some(value), &mut key)?;
    if best.as_ref().is_none_or(|best| (&key, source) < (&best.key, best.source)) {
        *best = Some(Extreme { key, value: value.to_vec(), source });
    }
    Ok(())
}

impl Source {
    fn integer(&self, row: &Row<'_>) -> Result<Option<i128>, UserError> {
        let Some(value) = row.get(self.column) else { return Ok(None) };
        value::integer(self.kind, self.binary, value)
            .map(|value| Some(value.into()))
            .ok_or_else(|| malformed(self.column))
    }

    fn float(&self, row: &Row<'_>) -> Result<Option<f64>, UserError> {
        let Some(value) = row.get(self.column) else { return Ok(None) };
        value::float(self.kind, self.binary, value).map(Some).ok_or_else(|| malformed(self.column))
    }

    /// Of a numeric or an integer column.
    fn numeric(&self, row: &Row<'_>) -> Result<Option<Numeric>, UserError> {
        if self.kind != Kind::Numeric {
            return Ok(self.integer(row)?.map(Numeric::from));
        }
        let Some(value) = row.get(self.column) else { return Ok(None) };
        let decimal: Decimal = value::decimal(self.binary, value).ok_or_else(|| malformed(self.column))?;
        Ok(Some(decimal.into()))
    }
}

fn malformed(column: usize) -> UserError {
    UserError::new(Blame::Server, sqlstate::PROTOCOL_VIOLATION, "a shard sent a value that is not of its column's type")
        .detail(format!("Column {} of its rows could not be read.", column + 1))
        .hint("Check that all shards have the same schema.")
}
