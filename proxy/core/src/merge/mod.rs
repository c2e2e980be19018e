//! Joining the answers of several shards into the one answer Postgres would have given.
//!
//! The planner decides whether and how ([`MergeSpec`]); the merger only follows it, and refuses when the column types
//! turn out to be ones whose order or sum it cannot reproduce exactly.

/// How the result rows of several shards become one result. Column numbers are 0-based positions in the shard's rows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MergeSpec {
    /// That many trailing columns were added by weir for its own use; they are stripped from descriptions and rows.
    pub hidden: usize,
    /// Re-aggregate partial results.
    pub group: Option<GroupSpec>,
    /// SELECT DISTINCT over the visible columns.
    pub distinct: bool,
    /// Final order. Empty: any order (rows are passed on as they come).
    pub order: Vec<OrderKey>,
    /// Rows skipped after ordering.
    pub offset: u64,
    /// Rows returned at most after `offset`.
    pub limit: Option<u64>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupSpec {
    /// Grouping columns: rows with equal values here become one row. Empty: one row in all.
    pub keys: Vec<usize>,
    /// What to do with every column that is not a key.
    pub folds: Vec<Fold>,
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
    Min,
    Max,
    /// avg(x) recomposed from hidden columns that hold sum(x) and count(x).
    Avg { sum: usize, count: usize },
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
