//! The merger: rows of several shards in, the rows of one answer out, without sockets.
//!
//! Invariants: what comes out is what one Postgres would have sent, or an error; memory stays within [`MergeLimits`].
//! Three ways: *relay* (no order: rows go out as they come), *interleave* (every source is sorted: the smallest head
//! goes out next), *regroup* (partial groups are folded, then sorted).
//! Where rows are equal but look different (numeric 1.0 and 1.00, -0 and 0) the lowest source's is shown, except for DISTINCT
//! without an order, which shows the first that came.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use bytes::BytesMut;
use hashbrown::{HashMap, HashSet};

use super::fold::{Folder, State};
use super::formula::{Computed, Formula};
use super::output::{Budget, Distinct, Last, Output, key_of};
use super::row::{Row, RowBuilder};
use super::value::Comparable;
use super::{GroupSpec, MergeLimits, MergeSpec, ResultColumn, internal, unsupported};
use crate::error::UserError;

/// Whose rows are needed to get on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wants {
    /// Every source that is still open.
    All,
    One(usize),
    /// Output is ready, or there will be none any more: poll.
    Nothing,
}

/// Merges the rows of `sources` shards. Feed it with [`push`](Merger::push) and [`finish`](Merger::finish), then
/// [`poll`](Merger::poll) after every batch.
pub struct Merger {
    mode: Mode,
    columns: usize,
    /// Which sources may still send rows.
    open: Vec<bool>,
    output: Output,
    budget: Budget,
}

enum Mode {
    Relay,
    Interleave(Interleave),
    Regroup(Regroup),
}

impl Merger {
    /// `columns` are those of the shards' rows, hidden ones included. Fails (0A000) for types that cannot be reproduced
    /// exactly for what `spec` asks.
    pub fn new(
        spec: MergeSpec,
        columns: Vec<ResultColumn>,
        sources: usize,
        limits: MergeLimits,
    ) -> Result<Self, UserError> {
        check_positions(&spec, columns.len())?;
        let order = order_columns(&spec, &columns)?;
        let visible = columns.len() - spec.hidden;
        let first_of = |column: &usize| equality(*column, &columns, "DISTINCT ON");
        let distinct = if !spec.distinct_on.is_empty() {
            if order.is_empty() || spec.group.is_some() {
                return Err(internal("DISTINCT ON without an order"));
            }
            let compared = spec.distinct_on.iter().map(first_of).collect::<Result<Vec<_>, _>>()?;
            Distinct::Adjacent { columns: compared, previous: None }
        } else if spec.distinct {
            let compared =
                (0..visible).map(|column| equality(column, &columns, "DISTINCT")).collect::<Result<Vec<_>, _>>()?;
            let adjacent = !order.is_empty() && (0..visible).all(|column| order.iter().any(|key| key.column == column));
            if adjacent {
                Distinct::Adjacent { columns: compared, previous: None }
            } else {
                Distinct::Seen { columns: compared, seen: HashSet::default() }
            }
        } else {
            Distinct::Off
        };
        if spec.ties && order.is_empty() {
            return Err(internal("WITH TIES without an order"));
        }
        let ties = if spec.ties { order.clone() } else { Vec::new() };
        let mode = match &spec.group {
            Some(group) => Mode::Regroup(Regroup::new(group, order, &columns)?),
            None if order.is_empty() => Mode::Relay,
            None => Mode::Interleave(Interleave::new(order, sources)),
        };
        let output = Output::new(visible, distinct, spec.offset, Last::new(spec.limit, ties));
        Ok(Merger { mode, columns: columns.len(), open: vec![true; sources], output, budget: Budget::new(limits) })
    }

    /// Takes the body of one DataRow message. Once [`done`](Merger::done) it is ignored.
    pub fn push(&mut self, source: usize, row: &[u8]) -> Result<(), UserError> {
        if self.open.get(source) != Some(&true) {
            return Err(internal("a row came from a source that has finished"));
        }
        if self.output.is_full() {
            return Ok(());
        }
        let parsed = Row::parse(row, self.columns)?;
        match &mut self.mode {
            Mode::Relay => {
                self.budget.check_ready(self.output.ready_bytes())?;
                self.output.offer(&parsed, &mut self.budget)
            }
            Mode::Interleave(interleave) => interleave.push(source, &parsed, row, &mut self.budget),
            Mode::Regroup(regroup) => regroup.push(source, &parsed, row, &mut self.budget),
        }
    }

    /// `source` will send no more rows.
    pub fn finish(&mut self, source: usize) {
        if let Some(open) = self.open.get_mut(source) {
            *open = false;
        }
    }

    /// Whose rows are needed to get on.
    pub fn wants(&self) -> Wants {
        if self.output.is_full() || !self.open.contains(&true) {
            return Wants::Nothing;
        }
        match &self.mode {
            Mode::Relay | Mode::Regroup(_) => Wants::All,
            Mode::Interleave(interleave) => interleave.missing(&self.open).map_or(Wants::Nothing, Wants::One),
        }
    }

    /// Appends the DataRow frames that are ready (without hidden columns) to `out`; returns how many.
    pub fn poll(&mut self, out: &mut BytesMut) -> Result<usize, UserError> {
        match &mut self.mode {
            Mode::Relay => {}
            Mode::Interleave(interleave) => interleave.advance(&self.open, &mut self.output, &mut self.budget)?,
            Mode::Regroup(regroup) => {
                if !self.open.contains(&true) {
                    regroup.emit(&mut self.output, &mut self.budget)?;
                }
            }
        }
        Ok(self.output.drain(out))
    }

    /// No row will come any more: LIMIT is satisfied (what sources still send is to be thrown away), or all were polled.
    pub fn done(&self) -> bool {
        if self.output.ready_bytes() > 0 {
            return false;
        }
        self.output.is_full()
            || !self.open.contains(&true)
                && match &self.mode {
                    Mode::Relay => true,
                    Mode::Interleave(interleave) => interleave.heads.is_empty(),
                    Mode::Regroup(regroup) => regroup.emitted,
                }
    }

    /// Rows polled so far, for the command tag.
    pub fn rows(&self) -> u64 {
        self.output.rows()
    }
}

/// The planner's column numbers must exist.
fn check_positions(spec: &MergeSpec, columns: usize) -> Result<(), UserError> {
    let order = spec.order.iter().map(|key| key.column).chain(spec.distinct_on.iter().copied());
    let group = spec.group.iter().flat_map(|group| {
        let folds = group.folds.iter().flat_map(|fold| match fold.kind {
            super::FoldKind::Avg { sum, count } => [fold.column, sum, count],
            _ => [fold.column; 3],
        });
        let computed = group.computed.iter().map(|computed| computed.0);
        let formulas = group.computed.iter().map(|computed| &computed.1).chain(&group.having);
        let used = formulas.flat_map(Formula::columns);
        group.keys.iter().copied().chain(folds).chain(computed).chain(used)
    });
    if order.chain(group).any(|column| column >= columns) || spec.hidden > columns {
        return Err(internal("the plan names a column that the shards' rows do not have"));
    }
    Ok(())
}

fn order_columns(spec: &MergeSpec, columns: &[ResultColumn]) -> Result<Vec<Comparable>, UserError> {
    let comparable = |key: &super::OrderKey| {
        let ResultColumn { type_oid, binary, .. } = columns[key.column];
        let kind = columns[key.column]
            .kind()
            .filter(|kind| key.byte_order || !kind.is_collated())
            .ok_or_else(|| unsupported("ORDER BY", key.column, type_oid))?;
        Ok(Comparable { column: key.column, kind, binary, descending: key.descending, nulls_first: key.nulls_first })
    };
    spec.order.iter().map(comparable).collect()
}

/// Equality needs no byte order: collations are deterministic unless declared otherwise, so equal text has equal bytes.
fn equality(column: usize, columns: &[ResultColumn], what: &str) -> Result<Comparable, UserError> {
    let ResultColumn { type_oid, binary, .. } = columns[column];
    let kind = columns[column].kind().ok_or_else(|| unsupported(what, column, type_oid))?;
    Ok(Comparable { column, kind, binary, descending: false, nulls_first: false })
}

/// K-way merge of sorted sources.
struct Interleave {
    order: Vec<Comparable>,
    /// At most one row per source; the smallest on top.
    heads: BinaryHeap<Head>,
    has_head: Vec<bool>,
    /// Rows behind the heads.
    queues: Vec<VecDeque<Head>>,
}

/// A row with its sort bytes.
struct Head {
    key: Vec<u8>,
    source: usize,
    row: Box<[u8]>,
}

impl Head {
    fn bytes(&self) -> usize {
        self.key.len() + self.row.len()
    }
}

/// Reversed, because the standard heap has its largest on top. Ties go to the lowest source.
impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key.cmp(&self.key).then(other.source.cmp(&self.source))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

impl Interleave {
    fn new(order: Vec<Comparable>, sources: usize) -> Self {
        let queues = (0..sources).map(|_| VecDeque::new()).collect();
        Interleave { order, heads: BinaryHeap::with_capacity(sources), has_head: vec![false; sources], queues }
    }

    fn push(&mut self, source: usize, parsed: &Row<'_>, row: &[u8], budget: &mut Budget) -> Result<(), UserError> {
        let head = Head { key: key_of(&self.order, parsed)?, source, row: row.into() };
        budget.take(head.bytes())?;
        if self.has_head[source] {
            self.queues[source].push_back(head);
        } else {
            self.has_head[source] = true;
            self.heads.push(head);
        }
        Ok(())
    }

    /// The first open source whose next row is not known.
    fn missing(&self, open: &[bool]) -> Option<usize> {
        open.iter().zip(&self.has_head).position(|(open, has_head)| *open && !has_head)
    }

    fn advance(&mut self, open: &[bool], output: &mut Output, budget: &mut Budget) -> Result<(), UserError> {
        let mut missing = self.missing(open).is_some();
        while !missing && !output.is_full() {
            let Some(head) = self.heads.pop() else { break };
            match self.queues[head.source].pop_front() {
                Some(next) => self.heads.push(next),
                None => {
                    self.has_head[head.source] = false;
                    missing = open[head.source];
                }
            }
            budget.give_back(head.bytes());
            let columns = usize::from(u16::from_be_bytes([head.row[0], head.row[1]]));
            output.offer(&Row::parse(&head.row, columns)?, budget)?;
        }
        Ok(())
    }
}

/// Folds partial groups; everything goes out after the last source has finished.
struct Regroup {
    keys: Vec<Comparable>,
    folders: Vec<Folder>,
    /// Column, whether it is binary, and how it is computed.
    computed: Vec<(usize, bool, Computed)>,
    having: Option<Computed>,
    order: Vec<Comparable>,
    columns: usize,
    groups: HashMap<Box<[u8]>, Group, foldhash::fast::RandomState>,
    emitted: bool,
}

struct Group {
    /// The source of `row`.
    source: usize,
    /// Shows the columns that are not folded; `None` for a group without any row.
    row: Option<Box<[u8]>>,
    states: Vec<State>,
}

/// A finished group.
struct Folded {
    /// Sort bytes, then the group's own key: so that the order is the same whichever shard answered first.
    order: (Vec<u8>, Box<[u8]>),
    row: Vec<u8>,
}

impl Regroup {
    /// What one fold's state costs.
    const STATE_BYTES: usize = 96;

    fn new(spec: &GroupSpec, order: Vec<Comparable>, columns: &[ResultColumn]) -> Result<Self, UserError> {
        let keys = spec.keys.iter().map(|&column| equality(column, columns, "GROUP BY")).collect::<Result<_, _>>()?;
        let folders = spec.folds.iter().map(|&fold| Folder::new(fold, columns)).collect::<Result<_, _>>()?;
        let shown = |(column, formula): &(usize, Formula)| {
            Ok((*column, columns[*column].binary, Computed::shown(formula, *column, columns)?))
        };
        let computed = spec.computed.iter().map(shown).collect::<Result<_, UserError>>()?;
        let having = spec.having.as_ref().map(|having| Computed::condition(having, columns)).transpose()?;
        Ok(Regroup {
            keys,
            folders,
            computed,
            having,
            order,
            columns: columns.len(),
            groups: HashMap::default(),
            emitted: false,
        })
    }

    fn start(&self, source: usize, row: Option<&[u8]>) -> Group {
        Group { source, row: row.map(Into::into), states: self.folders.iter().map(Folder::start).collect() }
    }

    fn push(&mut self, source: usize, parsed: &Row<'_>, row: &[u8], budget: &mut Budget) -> Result<(), UserError> {
        let key = key_of(&self.keys, parsed)?;
        if !self.groups.contains_key(&key[..]) {
            budget.check_groups(self.groups.len() + 1)?;
            budget.take(key.len() + row.len() + self.folders.len() * Self::STATE_BYTES)?;
            let group = self.start(source, Some(row));
            self.groups.insert(key.clone().into(), group);
        }
        let Some(group) = self.groups.get_mut(&key[..]) else { return Ok(()) };
        if source < group.source {
            let old = group.row.replace(row.into());
            group.source = source;
            budget.give_back(old.map_or(0, |old| old.len()));
            budget.take(row.len())?;
        }
        for (folder, state) in self.folders.iter().zip(&mut group.states) {
            folder.add(state, source, parsed)?;
        }
        Ok(())
    }

    fn emit(&mut self, output: &mut Output, budget: &mut Budget) -> Result<(), UserError> {
        if std::mem::replace(&mut self.emitted, true) {
            return Ok(());
        }
        let mut groups = std::mem::take(&mut self.groups);
        if groups.is_empty() && self.keys.is_empty() {
            // An aggregate without GROUP BY has one row even over nothing.
            groups.insert(Box::default(), self.start(0, None));
        }
        let mut folded = Vec::with_capacity(groups.len());
        for (key, group) in groups {
            folded.extend(self.fold(key, &group)?);
        }
        folded.sort_unstable_by(|a, b| a.order.cmp(&b.order));
        for group in folded {
            output.offer(&Row::parse(&group.row, self.columns)?, budget)?;
        }
        Ok(())
    }

    /// The group's row; `None` if HAVING leaves it out.
    fn fold(&self, key: Box<[u8]>, group: &Group) -> Result<Option<Folded>, UserError> {
        let shown = group.row.as_deref().map(|row| Row::parse(row, self.columns)).transpose()?;
        let mut builder = RowBuilder::new(self.columns);
        for column in 0..self.columns {
            match self.folders.iter().position(|folder| folder.column == column) {
                Some(index) => builder.push(self.folders[index].finish(&group.states[index])?.as_deref()),
                None => builder.push(shown.as_ref().and_then(|row| row.get(column))),
            }
        }
        let mut row = builder.finish();
        let folded = Row::parse(&row, self.columns)?;
        if let Some(having) = &self.having
            && !having.holds(&folded)?
        {
            return Ok(None);
        }
        if !self.computed.is_empty() {
            row = self.compute(&folded)?;
        }
        let order = key_of(&self.order, &Row::parse(&row, self.columns)?)?;
        Ok(Some(Folded { order: (order, key), row }))
    }

    /// The row with its computed columns filled in.
    fn compute(&self, folded: &Row<'_>) -> Result<Vec<u8>, UserError> {
        let mut builder = RowBuilder::new(self.columns);
        for column in 0..self.columns {
            match self.computed.iter().find(|computed| computed.0 == column) {
                Some((_, binary, computed)) => builder.push(computed.write(folded, *binary)?.as_deref()),
                None => builder.push(folded.get(column)),
            }
        }
        Ok(builder.finish())
    }
}
