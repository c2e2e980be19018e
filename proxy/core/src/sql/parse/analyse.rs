//! The state of one analysis: range-table entries, column nodes, and the facts about each block.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::rc::Rc;

use sqlparser::ast::{BinaryOperator, Expr, Query, Visit, Visitor};
use sqlparser::tokenizer::Location;

use super::env::{Env, NodeId};
use super::scope::{Column, Columns, Entry, Output, Outputs, Resolved, Scope};
use super::terms::{self, Condition, Constant};
use crate::sql::facts::{KeySet, KeySetting, Schema, SelectShape, Spread, TableName, Term, Use, family};
use crate::topology::{KeyType, Placement};

/// Why a statement is treated as if it could not be parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unparsed(pub &'static str);

/// One entry of a FROM list, anywhere in the statement.
#[derive(Debug)]
pub struct Owner {
    /// Set for relations, not for sub-queries, WITH names and functions.
    pub instance: Option<usize>,
    /// What holds where its rows matter; set when its block is finished.
    pub env: Option<Rc<Env>>,
    pub nullable: bool,
}

#[derive(Debug)]
pub struct InstanceDraft {
    pub table: TableName,
    pub usage: Use,
    pub owner: usize,
    pub top: bool,
    /// Keys given by VALUES or a select list instead of by conditions.
    pub keys: Option<KeySet>,
    /// The name its columns go by; `None`: they have other names there.
    pub called: Option<String>,
    /// Where the block it stands in begins.
    pub block: Option<Location>,
}

/// An IN (sub-query) and the outer columns its outputs are compared with.
pub struct InLink {
    query: *const Query,
    left: Vec<Option<NodeId>>,
}

pub struct Analyser<'a> {
    pub schema: &'a Schema<'a>,
    /// Client parameters; higher numbers are lifted literals.
    pub params: u16,
    pub owners: Vec<Owner>,
    pub instances: Vec<InstanceDraft>,
    nodes: Vec<(usize, String)>,
    node_ids: HashMap<(usize, String), NodeId>,
    /// How often each parameter was met as a key.
    pub key_uses: HashMap<u16, usize>,
    pub key_setting: KeySetting,
    /// Where among the values of an INSERT its key stands.
    pub key_position: Option<usize>,
    pub differing_defaults: Vec<(TableName, Box<str>)>,
    pub updates_conflicts: bool,
    /// Instances mentioned inside sub-queries that return only some of their rows.
    pub limited: Vec<std::ops::Range<usize>>,
    pub writes_in_with: bool,
    pub with: bool,
    pub select: Option<SelectShape>,
    pub unspreadable: Option<&'static str>,
    /// Levels of blocks around the present one.
    pub level: usize,
    /// Where the present block begins: its SELECT, UPDATE or DELETE.
    pub block: Option<Location>,
}

impl<'a> Analyser<'a> {
    pub fn new(schema: &'a Schema<'a>, params: u16) -> Self {
        Analyser {
            schema,
            params,
            owners: Vec::new(),
            instances: Vec::new(),
            nodes: Vec::new(),
            node_ids: HashMap::new(),
            key_uses: HashMap::new(),
            key_setting: KeySetting::Fine,
            key_position: None,
            differing_defaults: Vec::new(),
            updates_conflicts: false,
            limited: Vec::new(),
            writes_in_with: false,
            with: false,
            select: None,
            unspreadable: None,
            level: 0,
            block: None,
        }
    }

    pub fn unspreadable(&mut self, why: &'static str) {
        self.unspreadable.get_or_insert(why);
    }

    pub fn node(&mut self, owner: usize, column: &str) -> NodeId {
        if let Some(&node) = self.node_ids.get(&(owner, column.to_owned())) {
            return node;
        }
        let node = self.nodes.len();
        self.nodes.push((owner, column.to_owned()));
        self.node_ids.insert((owner, column.to_owned()), node);
        node
    }

    /// Adds a range-table entry that is no relation.
    pub fn add_owner(&mut self) -> usize {
        self.owners.push(Owner { instance: None, env: None, nullable: false });
        self.owners.len() - 1
    }

    /// Adds a relation.
    pub fn add_instance(&mut self, table: TableName, usage: Use) -> (usize, Columns) {
        let owner = self.add_owner();
        let columns = self.columns_of(&table);
        if let Placement::Sharded { key, .. } = self.schema.placement(&table) {
            self.node(owner, key);
        }
        self.owners[owner].instance = Some(self.instances.len());
        let (top, block) = (self.level == 1, self.block);
        self.instances.push(InstanceDraft { table, usage, owner, top, keys: None, called: None, block });
        (owner, columns)
    }

    fn columns_of(&self, table: &TableName) -> Columns {
        let key = match self.schema.placement(table) {
            Placement::Sharded { key, key_type } => Some((&**key, *key_type)),
            Placement::Reference | Placement::Global => None,
        };
        if let Some(relation) = self.schema.relation(table) {
            let columns = relation.columns.iter().map(|column| Column {
                name: column.name.to_string(),
                family: family(column.type_oid),
                byte_order: column.byte_order,
                type_oid: column.type_oid,
            });
            return Columns::Known(columns.collect());
        }
        key.map_or(Columns::Unknown, |(name, key_type)| {
            Columns::KeyOnly(Column { name: name.to_owned(), family: Some(key_type), byte_order: false, type_oid: 0 })
        })
    }

    /// The node of a column expression whose type can be a key.
    pub fn expr_node(&mut self, expr: &Expr, scope: &Scope<'_>) -> Option<(NodeId, KeyType, bool)> {
        let resolved = resolve(expr, scope)?;
        let family = resolved.column.family?;
        let (owner, name, local) = (resolved.entry.owner, resolved.column.name.clone(), resolved.local);
        Some((self.node(owner, &name), family, local))
    }

    /// Key sets that a client parameter with a minus in front cannot be part of: the server may give it any type.
    pub fn key_set(&mut self, constants: Vec<Constant>, family: KeyType) -> Option<KeySet> {
        let keys = terms::key_set(constants, family)?;
        for term in &keys.terms {
            match term {
                Term::Param { number, negated: true } if *number <= self.params => return None,
                Term::Param { number, .. } | Term::Array { number } => *self.key_uses.entry(*number).or_default() += 1,
                _ => {}
            }
        }
        Some(keys)
    }

    /// Adds what a condition says to `env`. `strict`: also when it is only about columns of outer blocks.
    pub fn learn(&mut self, condition: &Expr, scope: &Scope<'_>, env: &mut Env, strict: bool) {
        let mut parts = Vec::new();
        terms::conditions(condition, &mut |part| parts.push(part));
        for part in parts {
            match part {
                Condition::Equal(left, right) => {
                    if let (Some((left, left_family, left_local)), Some((right, right_family, right_local))) =
                        (self.expr_node(left, scope), self.expr_node(right, scope))
                        && left_family == right_family
                        && (strict || left_local || right_local)
                    {
                        env.union(left, right);
                    }
                }
                Condition::OneOf(column, constants) => {
                    if let Some((node, family, local)) = self.expr_node(column, scope)
                        && (strict || local)
                        && let Some(keys) = self.key_set(constants, family)
                    {
                        env.restrict(node, keys);
                    }
                }
                Condition::Either(left, right) => {
                    for (node, keys) in self.either(left, right, scope) {
                        env.restrict(node, keys);
                    }
                }
            }
        }
    }

    /// Columns that both arms of an OR bind, with the union of what they bind them to.
    fn either(&mut self, left: &Expr, right: &Expr, scope: &Scope<'_>) -> Vec<(NodeId, KeySet)> {
        let left = self.arm(left, scope);
        let right = self.arm(right, scope);
        let mut both = Vec::new();
        for (node, mut keys) in left {
            if let Some((_, more)) = right.iter().find(|(other, _)| *other == node) {
                keys.terms.extend(more.terms.iter().cloned());
                both.push((node, keys));
            }
        }
        both
    }

    fn arm(&mut self, arm: &Expr, scope: &Scope<'_>) -> Vec<(NodeId, KeySet)> {
        let mut parts = Vec::new();
        terms::conditions(arm, &mut |part| parts.push(part));
        let mut bound = Vec::new();
        for part in parts {
            match part {
                Condition::Equal(..) => {}
                Condition::OneOf(column, constants) => {
                    if let Some((node, family, true)) = self.expr_node(column, scope)
                        && let Some(keys) = self.key_set(constants, family)
                    {
                        bound.push((node, keys));
                    }
                }
                Condition::Either(left, right) => bound.extend(self.either(left, right, scope)),
            }
        }
        bound
    }

    /// Analyses the sub-queries an expression holds; what holds outside them is `env`.
    pub fn visit_subqueries(&mut self, node: &impl Visit, scope: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        let mut finder = Finder { analyser: self, scope, env, depth: 0, links: Vec::new(), failed: None };
        let _ = node.visit(&mut finder);
        finder.failed.map_or(Ok(()), Err)
    }

    /// The env in which an instance's rows matter, and its key's node.
    fn key_node(&self, instance: usize) -> Option<(NodeId, Rc<Env>)> {
        let draft = &self.instances[instance];
        let Placement::Sharded { key, .. } = self.schema.placement(&draft.table) else { return None };
        let node = *self.node_ids.get(&(draft.owner, key.to_string()))?;
        Some((node, self.owners[draft.owner].env.clone()?))
    }

    /// Keys an instance is restricted to.
    pub fn keys_of(&self, instance: usize) -> Option<KeySet> {
        if let Some(keys) = &self.instances[instance].keys {
            return Some(keys.clone());
        }
        let (node, env) = self.key_node(instance)?;
        self.follow(node, &env, 0, &mut |node, env| env.keys_of(node).cloned())
    }

    /// Asks `answer` in `env`; if it has none, goes on at null-extended columns equal to `node`, in their own env.
    /// A match through such a column means that it is not null, so its ON condition held.
    fn follow<T>(
        &self,
        node: NodeId,
        env: &Env,
        depth: usize,
        answer: &mut impl FnMut(NodeId, &Env) -> Option<T>,
    ) -> Option<T> {
        if let Some(found) = answer(node, env) {
            return Some(found);
        }
        if depth >= 4 {
            return None;
        }
        for other in env.equals(node, self.nodes.len()) {
            let owner = &self.owners[self.nodes[other].0];
            if owner.nullable
                && let Some(own) = &owner.env
                && let Some(found) = self.follow(other, own, depth + 1, answer)
            {
                return Some(found);
            }
        }
        None
    }

    /// How the instance is spread, given the nodes of the core instances' keys (all in one class).
    pub fn spread_of(&self, instance: usize, core: &[NodeId]) -> Spread {
        let Some((node, env)) = self.key_node(instance) else { return Spread::Free };
        if core.contains(&node) {
            return Spread::Core;
        }
        let with =
            self.follow(node, &env, 0, &mut |node, env| core.iter().any(|&core| env.same(node, core)).then_some(()));
        if with.is_some() { Spread::WithCore } else { Spread::Free }
    }

    /// Keys of the sharded instances of the outermost FROM that are never null-extended, if all are equal.
    pub fn core_nodes(&self) -> Option<Vec<NodeId>> {
        let mut nodes = Vec::new();
        let mut env = None;
        for (index, draft) in self.instances.iter().enumerate() {
            if !draft.top || draft.usage == Use::Insert || self.owners[draft.owner].nullable {
                continue;
            }
            if !matches!(self.schema.placement(&draft.table), Placement::Sharded { .. }) {
                continue;
            }
            let (node, own) = self.key_node(index)?;
            nodes.push(node);
            env = Some(own);
        }
        let env = env?;
        nodes.iter().all(|&node| env.same(node, nodes[0])).then_some(nodes)
    }

    /// Is this column equal to a core key in `env`?
    pub fn is_key(&self, owner: usize, column: &str, core: &[NodeId], env: &Env) -> bool {
        let Some(&node) = self.node_ids.get(&(owner, column.to_owned())) else { return false };
        !self.owners[owner].nullable && core.iter().any(|&core| core == node || env.same(core, node))
    }

    /// Registers a sub-query, WITH query or VALUES list as an entry whose columns carry what is known of its outputs.
    pub fn add_outputs(&mut self, name: String, outputs: &Outputs, renamed: &[String], env: &mut Env) -> Entry {
        let owner = self.add_owner();
        let Some(outputs) = outputs else { return Entry { owner, name, columns: Columns::Unknown } };
        let mut columns = Vec::new();
        for (index, Output { column, node, keys }) in outputs.iter().enumerate() {
            let column = column.clone();
            let Some(mut column) = column.or_else(|| renamed.get(index).map(|_| unknown_column())) else {
                return Entry { owner, name, columns: Columns::Unknown };
            };
            if let Some(new_name) = renamed.get(index) {
                column.name.clone_from(new_name);
            }
            let own = self.node(owner, &column.name);
            if let Some(node) = node {
                env.union(own, *node);
            }
            if let Some(keys) = keys {
                env.restrict(own, keys.clone());
            }
            columns.push(column);
        }
        Entry { owner, name, columns: Columns::Known(columns.into()) }
    }
}

pub fn unknown_column() -> Column {
    Column { name: String::new(), family: None, byte_order: false, type_oid: 0 }
}

/// The column an expression is, if it is one.
pub fn resolve<'s>(expr: &Expr, scope: &'s Scope<'_>) -> Option<Resolved<'s>> {
    match terms::bare(expr) {
        Expr::Identifier(name) => scope.resolve(std::slice::from_ref(name)),
        Expr::CompoundIdentifier(parts) => scope.resolve(parts),
        _ => None,
    }
}

/// Finds the outermost sub-queries of an expression and analyses each.
struct Finder<'f, 'a, 's> {
    analyser: &'f mut Analyser<'a>,
    scope: &'f Scope<'s>,
    env: &'f Env,
    depth: usize,
    links: Vec<InLink>,
    failed: Option<Unparsed>,
}

impl Finder<'_, '_, '_> {
    fn link(&mut self, expr: &Expr, query: &Query) {
        let columns = match terms::bare(expr) {
            Expr::Tuple(columns) => columns.iter().collect(),
            column => vec![column],
        };
        let left = columns.into_iter().map(|column| self.analyser.expr_node(column, self.scope).map(|found| found.0));
        let left = left.collect();
        self.links.push(InLink { query: std::ptr::from_ref(query), left });
    }
}

impl Visitor for Finder<'_, '_, '_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if self.depth == 0 {
            match expr {
                Expr::InSubquery { expr, subquery, negated: false } => self.link(expr, subquery),
                Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => {
                    if let Expr::Subquery(query) = terms::bare(right) {
                        self.link(left, query);
                    }
                }
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.depth += 1;
        if self.depth == 1 {
            let link = self.links.iter().position(|link| std::ptr::eq(link.query, query));
            let left = link.map(|index| self.links.swap_remove(index).left);
            if let Err(failed) = self.analyser.subquery(query, self.scope, self.env, left.as_deref()) {
                self.failed = Some(failed);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _query: &Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }
}
