//! From facts to a plan: which shards, how fresh, how the answers are joined, and why.
//!
//! A [`Template`] is made once per statement shape ([`compile`]) and holds no shard number; [`Template::bind`] adds the
//! values of one execution and one [`Topology`]. Principle: right or refused. Whatever is not understood on sharded tables
//! ends as SQLSTATE 0A000 with a DETAIL that says why and a HINT that says what to do; with one shard nothing is refused.
//!
//! Non-goals: sending anything, and merging itself (see [`crate::merge`]).

mod bind;
mod carry;
mod clauses;
mod compile;
mod deal;
mod engine;
mod explain;
mod fill;
mod formula;
mod functions;
mod guests;
mod hidden;
mod reason;
mod refuse;
mod rewrite;
mod scatter;
mod ungrouped;
mod values;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::copy::{Layout, Options};
use crate::error::{Blame, UserError, sqlstate};
use crate::fresh::Dependencies;
use crate::id::ShardId;
use crate::merge::MergeSpec;
use crate::sql::class::Class;
use crate::topology::Topology;
use crate::topology::moves::Guests;

pub use crate::sql::facts::Schema;
pub use carry::{CarriedKey, Carry, Form, TEXT, Written, put_value};
pub use compile::{Compiled, Noting, compile, unread};
pub use deal::{Deal, Dealt, Returned};
pub use explain::explain;
pub use fill::{Drawing, Filling, Sequence};
pub use guests::WithoutGuests;
pub use reason::{KeyName, NoCacheReason, PrimaryReason, RouteReason};
pub use rewrite::{Edit, Piece, Rewrite};
pub use ungrouped::grouped_too;
pub use values::{Datum, Values};

/// The cached plan of one statement shape, with no shard number in it.
#[derive(Clone, Debug)]
pub struct Template {
    pub(crate) class: Class,
    pub(crate) inner: bind::Shape,
    pub(crate) filling: Option<Arc<Filling>>,
}

/// A template bound to values and one topology.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub target: Target,
    pub access: Access,
    /// Present exactly for reads on several shards; then the shards are sent [`Template::rewrite`]'s text.
    pub merge: Option<Box<MergeSpec>>,
    /// Present exactly for an INSERT whose rows belong to several shards; then each is sent its own.
    pub dealt: Option<Arc<Dealt>>,
    /// Rows that it could meet on its shards and must not: those are sent [`Template::without_guests`]'s text.
    pub guests: Option<Arc<Guests>>,
    pub reads: Dependencies,
    pub writes: Dependencies,
    pub cacheable: Result<(), NoCacheReason>,
    /// For how many milliseconds a cached answer may be served although it is overtaken, where all its tables allow that.
    pub stale_ms: Option<u32>,
    pub wrap: Wrap,
    /// What it does to columns that are unique over all shards.
    pub noting: Noting,
    pub reason: RouteReason,
}

/// What stands around the query or table of a statement, and changes how several shards answer it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Wrap {
    #[default]
    None,
    /// COPY … FROM STDIN: every row to the shard of its key.
    CopyIn(Arc<Layout>),
    /// COPY … TO STDOUT: the rows of one shard after those of the other.
    CopyOut(Arc<Options>),
    /// EXPLAIN: the plan, then each shard's own.
    Explain(ExplainFormat),
    /// DECLARE … CURSOR: a cursor on each shard, and FETCH merges.
    Cursor,
    /// The rows of its query are read first, then written as values.
    Carry(Arc<Carry>),
}

/// How EXPLAIN over shards is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExplainFormat {
    Text,
    Json,
    Yaml,
    Xml,
}

/// Where a statement runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    Home,
    One(ShardId),
    /// The same on every shard (reference tables, no tables): pick any.
    Any,
    /// A read to merge, or a keyless write, on these; ascending.
    Many(SmallVec<[ShardId; 4]>),
    All,
    /// The fallback engine on the hub, which sees the rows of all shards.
    Engine,
}

/// What kind of server may run it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// May go to a replica if it is fresh enough.
    Read,
    /// A read that must run on the primary.
    PrimaryRead(PrimaryReason),
    Write,
}

/// How the command tags and rows of a write on several shards become one reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Combine {
    /// Every shard does the same: one answer stands for all.
    Alike,
    /// Each shard has rows of its own: they add up.
    Sum,
}

impl Plan {
    /// Of a statement of weir's own, which changes nothing.
    pub fn of_weir() -> Self {
        Plan {
            target: Target::Home,
            access: Access::PrimaryRead(PrimaryReason::SessionStatement),
            merge: None,
            dealt: None,
            guests: None,
            reads: Dependencies::new(),
            writes: Dependencies::new(),
            cacheable: Err(NoCacheReason::NotSelect),
            stale_ms: None,
            wrap: Wrap::None,
            noting: Noting::None,
            reason: RouteReason::SessionStatement,
        }
    }

    /// Does it run in a transaction of weir's own, where there is none, so that what the shards note of it can be settled?
    pub fn settles(&self) -> bool {
        matches!(self.noting, Noting::Settled { .. })
            && matches!(self.wrap, Wrap::None | Wrap::CopyIn(_) | Wrap::Carry(_))
    }

    /// Does a plan made on [`crate::topology::moves::Apart`] touch a slot of `nobody`?
    pub fn touches(&self, nobody: ShardId) -> bool {
        match &self.target {
            Target::One(shard) => *shard == nobody,
            Target::Many(shards) => shards.contains(&nobody),
            Target::All => self.merge.is_some() || self.wrap != Wrap::None || self.combine() == Combine::Sum,
            Target::Engine => true,
            Target::Home | Target::Any => false,
        }
    }

    /// Does it change what every shard has: rows of reference tables, definitions?
    pub fn changes_shared(&self) -> bool {
        self.target == Target::All && self.access == Access::Write && self.combine() == Combine::Alike
    }

    pub fn combine(&self) -> Combine {
        match self.reason {
            RouteReason::Scatter | RouteReason::KeysApart { .. } | RouteReason::RowsApart => Combine::Sum,
            _ => Combine::Alike,
        }
    }
}

/// Where a statement may be parsed and described before its values are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DescribeTarget {
    Home,
    Any,
}

impl Template {
    /// Adds the values of one execution. Costs a hash per key and no allocation for a statement with one key.
    pub fn bind(&self, values: &Values<'_>, topology: &Topology) -> Result<Plan, UserError> {
        self.inner.bind(values, topology)
    }

    /// The plan of a statement that planning or merging has refused with `refusal`: the fallback engine answers it, if it is
    /// surely a read whose answer is the same there. Else the refusal itself.
    pub fn on_engine(&self, refusal: UserError) -> Result<Plan, UserError> {
        if !self.inner.engine || refusal.sqlstate != sqlstate::FEATURE_NOT_SUPPORTED || refusal.blame != Blame::Client {
            return Err(refusal);
        }
        Ok(Plan {
            target: Target::Engine,
            access: Access::Read,
            merge: None,
            dealt: None,
            guests: None,
            reads: Dependencies::new(),
            writes: Dependencies::new(),
            cacheable: Err(NoCacheReason::Engine),
            stale_ms: None,
            wrap: Wrap::None,
            noting: Noting::None,
            reason: RouteReason::Engine { refusal: Box::new(refusal) },
        })
    }

    pub fn describe_target(&self) -> DescribeTarget {
        self.inner.describe_target()
    }

    /// The edits that make the text each shard is sent, where the plan is to be merged.
    pub fn rewrite(&self) -> Option<&Rewrite> {
        self.inner.scatter.as_ref().ok().and_then(|scatter| scatter.read.as_ref()).map(|read| &read.rewrite)
    }

    /// Values that weir has to write into the statement first; what is planned then is the filled statement.
    pub fn filling(&self) -> Option<&Arc<Filling>> {
        self.filling.as_ref()
    }

    pub fn class(&self) -> &Class {
        &self.class
    }

    /// May it change anything, whatever its values?
    pub fn is_write(&self) -> bool {
        self.inner.access == Access::Write
    }

    /// Trailing columns that [`Template::rewrite`] adds.
    pub fn hidden_columns(&self) -> usize {
        self.inner.scatter.as_ref().ok().and_then(|scatter| scatter.read.as_ref()).map_or(0, |read| read.hidden)
    }

    /// Columns a shard's row must have for the merge to be right; the caller refuses anything else (the catalogue was stale).
    pub fn merged_columns(&self) -> Option<usize> {
        self.inner.scatter.as_ref().ok().and_then(|scatter| scatter.read.as_ref()).and_then(|read| read.columns)
    }

    /// Checks the parameter types a client declares (0: none) against the keys they are read as: a numeric or float where a
    /// bigint key is expected would be read wrongly in binary form.
    pub fn check_types(&self, types: &[u32]) -> Result<(), UserError> {
        self.inner.check_types(types)
    }
}
