//! What the hub answers, as the shards would have said it: their numbers for types, and no group whose one row is chance.
//!
//! Invariant: nothing here looks at rows. Non-goal: the statement's text ([`super::engine`]).

use bytes::BytesMut;
use weir_core::error::UserError;
use weir_core::plan::Plan;
use weir_core::sql::lex::lex;
use weir_core::sql::word;
use weir_wire::backend::tag;
use weir_wire::{frame, row};

use super::engine::{Asked, cannot};
use crate::engine::Ready;

const INTERVAL: u32 = 1186;
/// They make one row of several that are equal.
const GROUPING: &[&str] = &["distinct", "except", "group", "intersect", "union"];

/// The first frames with the shards' numbers for types.
pub fn with_own_types(reply: &[u8], asked: &Asked<'_>, plan: &Plan, ready: &Ready) -> Result<BytesMut, UserError> {
    let mut rest = reply;
    let mut out = BytesMut::with_capacity(reply.len());
    while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
        rest = &rest[next.raw.len()..];
        if next.tag == tag::NO_DATA && !asked.description {
            continue;
        }
        if next.tag != tag::ROW_DESCRIPTION {
            out.extend_from_slice(next.raw);
            continue;
        }
        let mut fields = row::fields(next.body).map_err(|_| cannot(plan, "its answer was malformed"))?;
        no_groups_of_intervals(&fields, asked.sql, plan)?;
        if !asked.description {
            continue;
        }
        for field in &mut fields {
            // A table's number there would be another table's, or none's.
            (field.table, field.attribute) = (0, 0);
            field.type_oid = ready.types.get(&field.type_oid).copied().unwrap_or(field.type_oid);
        }
        frame::put(&mut out, tag::ROW_DESCRIPTION, |out| row::put_fields(out, fields.into_iter()));
    }
    out.extend_from_slice(rest);
    Ok(out)
}

pub fn no_groups_of_intervals(fields: &[row::Field<'_>], sql: &str, plan: &Plan) -> Result<(), UserError> {
    if fields.iter().any(|field| field.type_oid == INTERVAL) && groups(sql) {
        let why = "which of several equal intervals (1 mon, 30 days) stands for all depends on the order of rows";
        return Err(cannot(plan, why).hint("Select the interval as text, or a bound of it."));
    }
    Ok(())
}

/// May it make one row of several that are equal?
pub fn groups(sql: &str) -> bool {
    says(sql, &|name| GROUPING.contains(&name))
}

/// Has the statement such a word? A text that is not understood has.
pub fn says(sql: &str, wanted: &dyn Fn(&str) -> bool) -> bool {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).is_err()
        || tokens.into_iter().filter_map(|token| word::name(sql, token)).any(|name| wanted(&name))
}
