//! Joining the answers of several shards into the one answer Postgres would have given.
//!
//! The planner decides whether and how ([`MergeSpec`]); the merger only follows it, and refuses when the column types
//! turn out to be ones whose order or sum it cannot reproduce exactly.
//!
//! Reading order: [`Merger`] (what is kept and when a row goes out), `output` (DISTINCT, OFFSET, LIMIT), `fold`
//! (aggregates), `formula` (expressions over them), `value` (types as bytes that sort), and below them `numeric`, `float`, `datetime`, `row`.

mod datetime;
mod float;
mod fold;
mod formula;
mod merger;
mod numeric;
mod output;
mod row;
mod value;

#[cfg(test)]
mod tests;

use crate::error::{Blame, UserError, sqlstate};
pub use formula::Formula;
pub use merger::{Merger, Wants};
pub use row::strip_row_description;

/// What merging needs to know of a column, from the shards' RowDescription.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResultColumn {
    /// pg_type.oid; Postgres describes a domain by its base type.
    pub type_oid: u32,
    /// pg_attribute.atttypmod, -1 for none.
    pub type_modifier: i32,
    /// The format the client asked for.
    pub binary: bool,
    /// Floats in text have fewer digits than tell one from another (extra_float_digits below 1).
    pub rounded: bool,
}

impl ResultColumn {
    /// `None`: its values cannot be compared or added.
    fn kind(&self) -> Option<value::Kind> {
        let lossy = self.rounded && !self.binary;
        value::Kind::of(self.type_oid).filter(|kind| !(lossy && kind.is_float()))
    }
}

/// How much one merge may keep in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergeLimits {
    /// Bytes of rows, keys and groups.
    pub buffered_bytes_max: usize,
    /// Groups, or distinct rows.
    pub groups_max: usize,
}

/// How the result rows of several shards become one result. Column numbers are 0-based positions in the shard's rows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MergeSpec {
    /// That many trailing columns were added by weir for its own use; they are stripped from descriptions and rows.
    pub hidden: usize,
    /// Re-aggregate partial results.
    pub group: Option<GroupSpec>,
    /// SELECT DISTINCT over the visible columns.
    pub distinct: bool,
    /// SELECT DISTINCT ON: of rows that are equal in these columns the first is returned. The order begins with them.
    pub distinct_on: Vec<usize>,
    /// Final order. Empty: any order (rows are passed on as they come).
    pub order: Vec<OrderKey>,
    /// Rows skipped after ordering.
    pub offset: u64,
    /// Rows returned at most after `offset`.
    pub limit: Option<u64>,
    /// Rows that sort like the last one within the limit are returned too (FETCH FIRST … WITH TIES). Needs an order.
    pub ties: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupSpec {
    /// Grouping columns: rows with equal values here become one row. Empty: one row in all.
    pub keys: Vec<usize>,
    /// What to do with every column that is not a key.
    pub folds: Vec<Fold>,
    /// Columns that are computed from others once those are folded; what the shards sent in them is not looked at.
    pub computed: Vec<(usize, Formula)>,
    /// HAVING: groups of which it is not true are left out.
    pub having: Option<Formula>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fold {
    pub column: usize,
    pub kind: FoldKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FoldKind {
    /// count(*) / count(x): int8 parts that add up.
    Count,
    /// sum(x): adds; null only if all parts are null.
    Sum,
    /// min(x); `byte_order`: may text be compared by bytes (its collation is known to be C-like)?
    Min {
        byte_order: bool,
    },
    Max {
        byte_order: bool,
    },
    /// avg(x) recomposed from hidden columns that hold sum(x) and count(x).
    Avg {
        sum: usize,
        count: usize,
    },
    /// bool_and / every.
    And,
    Or,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OrderKey {
    pub column: usize,
    pub descending: bool,
    pub nulls_first: bool,
    /// May text in this column be compared by bytes (its collation is known to be C-like)?
    pub byte_order: bool,
}

/// A column type that cannot be merged exactly (0A000).
fn unsupported(what: &str, column: usize, type_oid: u32) -> UserError {
    let collated = value::Kind::of(type_oid).is_some_and(value::Kind::is_collated);
    let reason = if collated {
        "its collation may not follow byte order"
    } else {
        "weir cannot reproduce it exactly for this type"
    };
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, format!("cannot merge {what} of several shards"))
        .detail(format!("It needs result column {} of type oid {type_oid}, but {reason}.", column + 1))
        .hint(if collated {
            "Add COLLATE \"C\" to the expression, or restrict the query to one shard key."
        } else {
            "Cast the column to a plain number, text or time type, or restrict the query to one shard key."
        })
}

/// The rows of several shards do not fit into what merging may keep (54000).
fn too_complex(detail: String) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "the rows of several shards are too many to merge")
        .detail(detail)
        .hint("Restrict the query to one shard key, select fewer rows or groups, or raise that limit.")
}

/// A plan or a caller broke the merger's rules (XX000).
fn internal(what: &'static str) -> UserError {
    UserError::new(Blame::Proxy, sqlstate::INTERNAL, what).hint("This is a bug in weir; please report the statement.")
}
