//! Queries and SELECT blocks: which names are visible, what holds in them, and what their output columns are.

use sqlparser::ast::{Cte, Distinct, Expr, GroupByExpr, LimitClause, Query, Select, SelectItem, SetExpr, Values};

use super::analyse::{Analyser, Unparsed, resolve, unknown_column};
use super::env::{Env, NodeId};
use super::from::{FromState, has_outer_join};
use super::scope::{CteEntry, Output, Outputs, Scope, ident};
use super::shape;
use super::terms::{bare, constant};
use crate::sql::facts::{KeySet, Term};
use crate::topology::catalog::Catalog;

impl Analyser<'_> {
    pub fn subquery(
        &mut self,
        query: &Query,
        scope: &Scope<'_>,
        env: &Env,
        link: Option<&[Option<NodeId>]>,
    ) -> Result<Outputs, Unparsed> {
        self.query(query, scope, env, link)
    }

    /// Analyses a query; `link`: outer columns its outputs are compared with by IN.
    pub fn query(
        &mut self,
        query: &Query,
        scope: &Scope<'_>,
        env: &Env,
        link: Option<&[Option<NodeId>]>,
    ) -> Result<Outputs, Unparsed> {
        if query.for_clause.is_some()
            || query.settings.is_some()
            || query.format_clause.is_some()
            || !query.pipe_operators.is_empty()
            || matches!(query.limit_clause, Some(LimitClause::OffsetCommaLimit { .. }))
        {
            return Err(Unparsed("it has a clause that is not Postgres's"));
        }
        let mut names = Scope::inside(scope);
        if let Some(with) = &query.with {
            self.with = true;
            for cte in &with.cte_tables {
                self.cte(cte, with.recursive, &mut names, env)?;
            }
        }
        let before = self.instances.len();
        let outputs = self.set_expr(&query.body, Some(query), &names, env, link)?;
        if self.level > 0 && returns_some_rows(query) {
            self.limited.push(before..self.instances.len());
        }
        Ok(outputs)
    }

    fn cte(&mut self, cte: &Cte, recursive: bool, names: &mut Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        let name = ident(&cte.alias.name);
        if recursive {
            names.ctes.push(CteEntry { name: name.clone(), outputs: None });
        }
        self.level += 1;
        let outputs = self.query(&cte.query, names, env, None);
        self.level -= 1;
        let mut outputs = strip_nodes(outputs?);
        if recursive || !cte.alias.columns.is_empty() {
            outputs = None;
        }
        names.ctes.push(CteEntry { name, outputs });
        Ok(())
    }

    fn set_expr(
        &mut self,
        body: &SetExpr,
        query: Option<&Query>,
        scope: &Scope<'_>,
        env: &Env,
        link: Option<&[Option<NodeId>]>,
    ) -> Result<Outputs, Unparsed> {
        match body {
            SetExpr::Select(select) => self.select(select, query, scope, env, link),
            SetExpr::Query(inner) => {
                self.unspreadable("a parenthesised query");
                self.level += 1;
                let outputs = self.query(inner, scope, env, None);
                self.level -= 1;
                if let Some(query) = query {
                    self.visit_tail(query, scope, env)?;
                }
                Ok(strip_nodes(outputs?))
            }
            SetExpr::SetOperation { left, right, .. } => {
                self.unspreadable("UNION, INTERSECT or EXCEPT");
                let left = self.set_expr(left, None, scope, env, None)?;
                let right = self.set_expr(right, None, scope, env, None)?;
                if let Some(query) = query {
                    self.visit_tail(query, scope, env)?;
                }
                Ok(both_branches(left, right))
            }
            SetExpr::Values(values) => {
                self.unspreadable("a VALUES list");
                self.values(values, scope, env)
            }
            SetExpr::Insert(statement) | SetExpr::Update(statement) | SetExpr::Delete(statement) => {
                if self.level > 0 {
                    self.writes_in_with = true;
                }
                self.statement(statement, scope, env)?;
                Ok(None)
            }
            SetExpr::Merge(_) => Err(Unparsed("MERGE is not analysed")),
            SetExpr::Table(_) => Err(Unparsed("it says TABLE where weir's parser would overlook it")),
        }
    }

    /// Sub-queries in ORDER BY, LIMIT and OFFSET.
    fn visit_tail(&mut self, query: &Query, scope: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        self.visit_subqueries(&query.order_by, scope, env)?;
        self.visit_subqueries(&query.limit_clause, scope, env)?;
        self.visit_subqueries(&query.fetch, scope, env)
    }

    fn values(&mut self, values: &Values, scope: &Scope<'_>, env: &Env) -> Result<Outputs, Unparsed> {
        for row in &values.rows {
            for value in &row.content {
                self.visit_subqueries(value, scope, env)?;
            }
        }
        Ok(None)
    }

    fn select(
        &mut self,
        select: &Select,
        query: Option<&Query>,
        outer: &Scope<'_>,
        env: &Env,
        link: Option<&[Option<NodeId>]>,
    ) -> Result<Outputs, Unparsed> {
        plain_select(select)?;
        self.level += 1;
        let around = self.block.replace(select.select_token.0.span.start);
        let mut scope = Scope::inside(outer);
        let mut env = env.clone();
        let mut from = FromState::for_trees(&select.from);
        for tree in &select.from {
            self.join_tree(tree, &mut scope, &mut env, &mut from)?;
        }
        if let Some(selection) = &select.selection {
            self.learn(selection, &scope, &mut env, true);
        }
        let outputs =
            self.outputs(select, &scope, &mut env, link.filter(|_| query.is_none_or(|q| !returns_some_rows(q))));
        self.finish_from(from, &scope, &env)?;
        self.visit_subqueries(&select.projection, &scope, &env)?;
        self.visit_subqueries(&select.selection, &scope, &env)?;
        self.visit_subqueries(&select.distinct, &scope, &env)?;
        self.visit_subqueries(&select.group_by, &scope, &env)?;
        self.visit_subqueries(&select.having, &scope, &env)?;
        self.visit_subqueries(&select.named_window, &scope, &env)?;
        if let Some(query) = query {
            self.visit_tail(query, &scope, &env)?;
            if self.level == 1 {
                self.select = shape::shape(self, select, query, &scope, &env);
            }
        }
        self.block = around;
        self.level -= 1;
        Ok(outputs)
    }

    /// What is known of the output columns; `link`ed ones are made equal to the outer columns they are compared with.
    pub fn outputs(
        &mut self,
        select: &Select,
        scope: &Scope<'_>,
        env: &mut Env,
        link: Option<&[Option<NodeId>]>,
    ) -> Outputs {
        let mut outputs = Vec::new();
        for item in &select.projection {
            match item {
                SelectItem::UnnamedExpr(expr) => outputs.push(self.output(expr, None, scope)),
                SelectItem::ExprWithAlias { expr, alias } => {
                    outputs.push(self.output(expr, Some(ident(alias)), scope));
                }
                SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..) => {
                    for (owner, column) in shape::expand(item, scope)? {
                        let node = column.family.is_some().then(|| self.node(owner, &column.name));
                        outputs.push(Output { column: Some(column), node, keys: None });
                    }
                }
                SelectItem::ExprWithAliases { .. } => return None,
            }
        }
        if let Some(left) = link
            && left.len() == outputs.len()
        {
            for (index, (left, output)) in left.iter().zip(&outputs).enumerate() {
                if let (Some(left), Some(node)) = (left, output.node)
                    && keeps_column(select, index, self.schema.catalog)
                {
                    env.union(*left, node);
                }
            }
        }
        for output in &mut outputs {
            if let Some(node) = output.node
                && output.keys.is_none()
            {
                output.keys = env.keys_of(node).cloned();
            }
        }
        Some(outputs)
    }

    fn output(&mut self, expr: &Expr, alias: Option<String>, scope: &Scope<'_>) -> Output {
        if let Some(found) = resolve(expr, scope) {
            let (owner, mut column) = (found.entry.owner, found.column.clone());
            let node = column.family.is_some().then(|| self.node(owner, &column.name));
            if let Some(alias) = alias {
                column.name = alias;
            }
            return Output { column: Some(column), node, keys: None };
        }
        let keys = constant(expr).filter(|constant| constant.cast.is_none()).map(|constant| KeySet::one(constant.term));
        if let Some(Term::Param { number, .. }) = keys.as_ref().map(|keys| &keys.terms[0]) {
            *self.key_uses.entry(*number).or_default() += 1;
        }
        let column = alias.map(|name| {
            let mut column = unknown_column();
            column.name = name;
            column
        });
        Output { column, node: None, keys }
    }
}

/// Is the n-th output a column that a row of FROM passes on unchanged? In a grouped block only grouped columns are.
fn keeps_column(select: &Select, index: usize, catalog: &Catalog) -> bool {
    let grouped = match &select.group_by {
        GroupByExpr::Expressions(exprs, _) => exprs,
        GroupByExpr::All(_) => return false,
    };
    if grouped.is_empty() && select.having.is_none() {
        return !shape::projects_aggregate(select, catalog);
    }
    match select.projection.get(index) {
        Some(SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. }) => {
            grouped.iter().any(|group| bare(group) == bare(expr))
        }
        _ => false,
    }
}

/// A sub-query in FROM whose rows are rows of its own FROM: conditions outside may be thought of as inside.
pub fn transparent<'q>(query: &'q Query, catalog: &Catalog) -> Option<&'q Select> {
    let SetExpr::Select(select) = &*query.body else { return None };
    let grouped = !matches!(&select.group_by, GroupByExpr::Expressions(exprs, modifiers) if exprs.is_empty() && modifiers.is_empty());
    if query.with.is_some()
        || query.order_by.is_some()
        || returns_some_rows(query)
        || !query.locks.is_empty()
        || select.distinct.is_some()
        || grouped
        || select.having.is_some()
        || !select.named_window.is_empty()
        || shape::projects_aggregate(select, catalog)
        || has_outer_join(&select.from)
        || plain_select(select).is_err()
    {
        return None;
    }
    Some(select)
}

/// LIMIT, OFFSET, FETCH or DISTINCT ON.
fn returns_some_rows(query: &Query) -> bool {
    let distinct_on =
        matches!(&*query.body, SetExpr::Select(select) if matches!(select.distinct, Some(Distinct::On(_))));
    query.limit_clause.is_some() || query.fetch.is_some() || distinct_on
}

fn plain_select(select: &Select) -> Result<(), Unparsed> {
    let foreign = select.top.is_some()
        || select.exclude.is_some()
        || !select.lateral_views.is_empty()
        || select.prewhere.is_some()
        || !select.connect_by.is_empty()
        || !select.cluster_by.is_empty()
        || !select.distribute_by.is_empty()
        || !select.sort_by.is_empty()
        || select.qualify.is_some()
        || select.value_table_mode.is_some()
        || select.select_modifiers.is_some();
    if foreign {
        return Err(Unparsed("it has a clause that is not Postgres's"));
    }
    if select.into.is_some() { Err(Unparsed("SELECT INTO is not analysed")) } else { Ok(()) }
}

/// Forgets which inner columns the outputs are; what is known of their values stays true.
pub fn strip_nodes(outputs: Outputs) -> Outputs {
    Some(outputs?.into_iter().map(|output| Output { node: None, ..output }).collect())
}

/// Output columns of a set operation: names of the left, keys of both.
fn both_branches(left: Outputs, right: Outputs) -> Outputs {
    let (left, right) = (left?, right?);
    if left.len() != right.len() {
        return None;
    }
    let both = left.into_iter().zip(right).map(|(left, right)| {
        let keys = match (left.keys, right.keys) {
            (Some(mut keys), Some(more)) => {
                keys.terms.extend(more.terms);
                Some(keys)
            }
            _ => None,
        };
        let same = left.column.as_ref().and_then(|column| column.family)
            == right.column.as_ref().and_then(|column| column.family);
        Output { column: left.column, node: None, keys: keys.filter(|_| same) }
    });
    Some(both.collect())
}
