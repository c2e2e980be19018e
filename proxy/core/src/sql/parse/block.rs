//! Queries, SELECT blocks and their FROM lists.
//!
//! What holds for the rows of an outer join's null-extended side is kept in an env of its own, so that its ON condition
//! never says anything of the preserved side.

use std::rc::Rc;

use sqlparser::ast::{
    Cte, Distinct, Expr, GroupByExpr, JoinConstraint, JoinOperator, LimitClause, Query, Select, SelectItem, SetExpr,
    TableAlias, TableFactor, TableWithJoins, Values,
};

use super::analyse::{Analyser, Unparsed, resolve};
use super::env::{Env, NodeId};
use super::scope::{Columns, CteEntry, Entry, Output, Outputs, Scope, ident, name_parts};
use super::shape;
use super::terms::{bare, constant};
use crate::sql::facts::{KeySet, Term, Use};

/// One outer join: whose rows may be null-extended, and under which condition they match.
struct OuterJoin<'q> {
    nullable: Vec<usize>,
    constraint: Option<&'q Expr>,
    using: Vec<(NodeId, NodeId)>,
}

/// A FROM clause under construction.
#[derive(Default)]
pub struct FromState<'q> {
    outer: Vec<OuterJoin<'q>>,
    /// Expressions whose sub-queries are analysed once the block's facts are complete.
    deferred: Vec<&'q Expr>,
    deferred_owners: Vec<usize>,
    has_outer: bool,
}

impl FromState<'_> {
    pub fn for_trees(trees: &[TableWithJoins]) -> Self {
        FromState { has_outer: has_outer_join(trees), ..FromState::default() }
    }
}

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
            return Err(Unparsed("a clause that is not Postgres's"));
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
            SetExpr::Merge(_) => Err(Unparsed("MERGE")),
            SetExpr::Table(_) => Err(Unparsed("TABLE")),
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
        let mut scope = Scope::inside(outer);
        let mut env = env.clone();
        let mut from = FromState::for_trees(&select.from);
        for tree in &select.from {
            self.join_tree(tree, &mut scope, &mut env, &mut from)?;
        }
        if let Some(selection) = &select.selection {
            self.learn(selection, &scope, &mut env, true);
        }
        let outputs = self.outputs(select, &scope, &mut env, link.filter(|_| query.is_none_or(|q| !returns_some_rows(q))));
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
        self.level -= 1;
        Ok(outputs)
    }

    /// Gives every entry of the block the env in which its rows matter, then looks into the deferred expressions.
    pub fn finish_from(&mut self, from: FromState<'_>, scope: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        let shared = Rc::new(env.clone());
        for owner in scope.entries.iter().map(|entry| entry.owner).chain(from.deferred_owners) {
            self.owners[owner].env = Some(Rc::clone(&shared));
        }
        for join in &from.outer {
            for (index, &owner) in join.nullable.iter().enumerate() {
                let uses = (index > 0).then(|| self.key_uses.clone());
                let mut own = self.owners[owner].env.as_deref().unwrap_or(env).clone();
                if let Some(on) = join.constraint {
                    self.learn(on, scope, &mut own, false);
                }
                for &(left, right) in &join.using {
                    own.union(left, right);
                }
                self.owners[owner].env = Some(Rc::new(own));
                self.owners[owner].nullable = true;
                if let Some(uses) = uses {
                    self.key_uses = uses;
                }
            }
        }
        for expr in from.deferred {
            self.visit_subqueries(expr, scope, env)?;
        }
        Ok(())
    }

    /// Adds a join tree to the block; returns the entries in it.
    pub fn join_tree<'q>(
        &mut self,
        tree: &'q TableWithJoins,
        scope: &mut Scope<'_>,
        env: &mut Env,
        from: &mut FromState<'q>,
    ) -> Result<Vec<usize>, Unparsed> {
        let mut left = self.factor(&tree.relation, scope, env, from)?;
        for join in &tree.joins {
            if join.global {
                return Err(Unparsed("GLOBAL JOIN"));
            }
            let right = self.factor(&join.relation, scope, env, from)?;
            self.join(&join.join_operator, (&left, &right), scope, env, from)?;
            left.extend(right);
        }
        Ok(left)
    }

    fn join<'q>(
        &mut self,
        operator: &'q JoinOperator,
        (left, right): (&[usize], &[usize]),
        scope: &mut Scope<'_>,
        env: &mut Env,
        from: &mut FromState<'q>,
    ) -> Result<(), Unparsed> {
        let (constraint, nullable): (_, Vec<usize>) = match operator {
            JoinOperator::Join(constraint) | JoinOperator::Inner(constraint) | JoinOperator::CrossJoin(constraint) => {
                (constraint, Vec::new())
            }
            JoinOperator::Left(constraint) | JoinOperator::LeftOuter(constraint) => (constraint, right.to_vec()),
            JoinOperator::Right(constraint) | JoinOperator::RightOuter(constraint) => (constraint, left.to_vec()),
            JoinOperator::FullOuter(constraint) => {
                self.unspreadable("FULL JOIN");
                (constraint, left.iter().chain(right).copied().collect())
            }
            _ => return Err(Unparsed("a join that is not Postgres's")),
        };
        let full = matches!(operator, JoinOperator::FullOuter(_));
        let inner = nullable.is_empty();
        let mut join = OuterJoin { nullable, constraint: None, using: Vec::new() };
        match constraint {
            JoinConstraint::On(on) => {
                from.deferred.push(on);
                if inner {
                    self.learn(on, scope, env, false);
                } else if !full {
                    join.constraint = Some(on);
                }
            }
            JoinConstraint::Using(columns) => {
                for column in columns {
                    let [name] = name_parts(column).ok_or(Unparsed("USING"))?.try_into().map_err(|_| Unparsed("USING"))?;
                    if let Some(pair) = self.using(&name, (left, right), operator, scope) {
                        if inner {
                            env.union(pair.0, pair.1);
                        } else if !full {
                            join.using.push(pair);
                        }
                    }
                }
            }
            JoinConstraint::None => {}
            JoinConstraint::Natural => return Err(Unparsed("NATURAL JOIN")),
        }
        if !inner {
            from.outer.push(join);
        }
        Ok(())
    }

    /// The two columns a USING name joins, if both are certain and of one key family; the bare name is the preserved side's.
    fn using(
        &mut self,
        name: &str,
        (left, right): (&[usize], &[usize]),
        operator: &JoinOperator,
        scope: &mut Scope<'_>,
    ) -> Option<(NodeId, NodeId)> {
        let previous = scope.merged.iter().position(|(merged, _)| merged == name);
        let side = |owners: &[usize]| {
            let mut found = scope.entries.iter().filter(|entry| owners.contains(&entry.owner) && entry.columns.get(name).is_some());
            let first = found.next();
            // Several: an earlier USING merged them, and its choice stands.
            let merged = previous.and_then(|index| scope.merged[index].1).filter(|owner| owners.contains(owner));
            let entry = match merged {
                Some(owner) => scope.entries.iter().find(|entry| entry.owner == owner),
                None => first,
            }?;
            Some((entry.owner, entry.columns.get(name)?.family))
        };
        // An entry with unknown columns could be the one that is meant.
        let unsure = |owners: &[usize]| {
            scope.entries.iter().any(|entry| owners.contains(&entry.owner) && matches!(entry.columns, Columns::Unknown))
        };
        let sides = (side(left), side(right));
        let certain = !(sides.0.is_none() && unsure(left) || sides.1.is_none() && unsure(right));
        let visible = match operator {
            JoinOperator::FullOuter(_) => None,
            JoinOperator::Right(_) | JoinOperator::RightOuter(_) => sides.1.map(|side| side.0),
            _ => sides.0.map(|side| side.0),
        };
        let visible = visible.filter(|_| certain);
        match previous {
            Some(index) => scope.merged[index].1 = visible,
            None => scope.merged.push((name.to_owned(), visible)),
        }
        let ((left, left_family), (right, right_family)) = (sides.0?, sides.1?);
        if left_family.is_none() || left_family != right_family {
            return None;
        }
        Some((self.node(left, name), self.node(right, name)))
    }

    fn factor<'q>(
        &mut self,
        factor: &'q TableFactor,
        scope: &mut Scope<'_>,
        env: &mut Env,
        from: &mut FromState<'q>,
    ) -> Result<Vec<usize>, Unparsed> {
        match factor {
            TableFactor::Table { name, alias, args, .. } => {
                if let Some(args) = args {
                    self.visit_subqueries(&args.args, scope, env)?;
                    let parts = name_parts(name).ok_or(Unparsed("a table name"))?;
                    return Ok(vec![self.opaque(parts.last().map_or("", String::as_str), alias.as_ref(), scope)]);
                }
                self.table(name_parts(name).ok_or(Unparsed("a table name"))?, alias.as_ref(), scope, env)
            }
            TableFactor::Derived { lateral, subquery, alias, .. } => {
                self.derived(subquery, (*lateral, alias.as_ref()), scope, env, from)
            }
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                self.join_tree(table_with_joins, scope, env, from)
            }
            TableFactor::Function { name, args, alias, .. } => {
                self.visit_subqueries(args, scope, env)?;
                let parts = name_parts(name).ok_or(Unparsed("a function name"))?;
                Ok(vec![self.opaque(parts.last().map_or("", String::as_str), alias.as_ref(), scope)])
            }
            TableFactor::TableFunction { expr, alias } => {
                self.visit_subqueries(expr, scope, env)?;
                Ok(vec![self.opaque("", alias.as_ref(), scope)])
            }
            TableFactor::UNNEST { array_exprs, alias, .. } => {
                self.visit_subqueries(array_exprs, scope, env)?;
                Ok(vec![self.opaque("unnest", alias.as_ref(), scope)])
            }
            _ => Err(Unparsed("an item in FROM")),
        }
    }

    /// An entry nothing is known of.
    fn opaque(&mut self, name: &str, alias: Option<&TableAlias>, scope: &mut Scope<'_>) -> usize {
        let owner = self.add_owner();
        let name = alias.map_or_else(|| name.to_owned(), |alias| ident(&alias.name));
        scope.entries.push(Entry { owner, name, columns: Columns::Unknown });
        owner
    }

    fn table(
        &mut self,
        parts: Vec<String>,
        alias: Option<&TableAlias>,
        scope: &mut Scope<'_>,
        env: &mut Env,
    ) -> Result<Vec<usize>, Unparsed> {
        let shown = alias.map(|alias| ident(&alias.name));
        let renames = alias.is_some_and(|alias| !alias.columns.is_empty());
        if let [name] = parts.as_slice()
            && let Some(cte) = scope.cte(name)
        {
            let outputs = if renames { None } else { cte.outputs.clone() };
            let entry = self.add_outputs(shown.unwrap_or_else(|| name.clone()), &outputs, &[], env);
            let owner = entry.owner;
            scope.entries.push(entry);
            return Ok(vec![owner]);
        }
        let (owner, columns) = self.relation(&parts, Use::Read)?;
        let columns = if renames { Columns::Unknown } else { columns };
        let name = shown.unwrap_or_else(|| parts.last().cloned().unwrap_or_default());
        scope.entries.push(Entry { owner, name, columns });
        Ok(vec![owner])
    }

    pub fn relation(&mut self, parts: &[String], usage: Use) -> Result<(usize, Columns), Unparsed> {
        let table = match parts {
            [name] => self.schema.resolve(None, name),
            [schema, name] | [_, schema, name] => self.schema.resolve(Some(schema), name),
            _ => return Err(Unparsed("a table name")),
        };
        Ok(self.add_instance(table, usage))
    }

    fn derived<'q>(
        &mut self,
        subquery: &'q Query,
        (lateral, alias): (bool, Option<&TableAlias>),
        scope: &mut Scope<'_>,
        env: &mut Env,
        from: &mut FromState<'q>,
    ) -> Result<Vec<usize>, Unparsed> {
        let name = alias.map(|alias| ident(&alias.name)).unwrap_or_default();
        let renamed: Vec<String> = alias.iter().flat_map(|alias| &alias.columns).map(|column| ident(&column.name)).collect();
        if !from.has_outer
            && !lateral
            && let Some(select) = transparent(subquery)
        {
            let mut inner = Scope { parent: scope.parent, ..Scope::default() };
            for tree in &select.from {
                self.join_tree(tree, &mut inner, env, from)?;
            }
            if let Some(selection) = &select.selection {
                self.learn(selection, &inner, env, true);
            }
            let outputs = self.outputs(select, &inner, env, None);
            // The sub-queries in it see its own names; what holds by now is enough for them.
            self.visit_subqueries(&select.projection, &inner, env)?;
            self.visit_subqueries(&select.selection, &inner, env)?;
            let mut owners: Vec<usize> = inner.entries.iter().map(|entry| entry.owner).collect();
            from.deferred_owners.extend(owners.iter().copied());
            let entry = self.add_outputs(name, &outputs, &renamed, env);
            owners.push(entry.owner);
            scope.entries.push(entry);
            return Ok(owners);
        }
        let outputs = if lateral {
            self.query(subquery, scope, env, None)?
        } else {
            let nothing = Scope::default();
            self.query(subquery, scope.parent.unwrap_or(&nothing), env, None)?
        };
        let entry = self.add_outputs(name, &strip_nodes(outputs), &renamed, env);
        let owner = entry.owner;
        scope.entries.push(entry);
        Ok(vec![owner])
    }

    /// What is known of the output columns; `link`ed ones are made equal to the outer columns they are compared with.
    fn outputs(&mut self, select: &Select, scope: &Scope<'_>, env: &mut Env, link: Option<&[Option<NodeId>]>) -> Outputs {
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
                    && keeps_column(select, index)
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
            let mut column = super::analyse::unknown_column();
            column.name = name;
            column
        });
        Output { column, node: None, keys }
    }
}

/// Is the n-th output a column that a row of FROM passes on unchanged? In a grouped block only grouped columns are.
fn keeps_column(select: &Select, index: usize) -> bool {
    let grouped = match &select.group_by {
        GroupByExpr::Expressions(exprs, _) => exprs,
        GroupByExpr::All(_) => return false,
    };
    if grouped.is_empty() && select.having.is_none() {
        return !shape::projects_aggregate(select);
    }
    match select.projection.get(index) {
        Some(SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. }) => grouped.iter().any(|group| bare(group) == bare(expr)),
        _ => false,
    }
}

/// A sub-query in FROM whose rows are rows of its own FROM: conditions outside may be thought of as inside.
fn transparent(query: &Query) -> Option<&Select> {
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
        || shape::projects_aggregate(select)
        || has_outer_join(&select.from)
        || plain_select(select).is_err()
    {
        return None;
    }
    Some(select)
}

/// LIMIT, OFFSET, FETCH or DISTINCT ON.
fn returns_some_rows(query: &Query) -> bool {
    let distinct_on = matches!(&*query.body, SetExpr::Select(select) if matches!(select.distinct, Some(Distinct::On(_))));
    query.limit_clause.is_some() || query.fetch.is_some() || distinct_on
}

fn has_outer_join(from: &[TableWithJoins]) -> bool {
    from.iter().any(|tree| {
        let nested = |factor: &TableFactor| match factor {
            TableFactor::NestedJoin { table_with_joins, .. } => has_outer_join(std::slice::from_ref(table_with_joins)),
            _ => false,
        };
        nested(&tree.relation)
            || tree.joins.iter().any(|join| {
                nested(&join.relation)
                    || !matches!(
                        join.join_operator,
                        JoinOperator::Join(_) | JoinOperator::Inner(_) | JoinOperator::CrossJoin(_)
                    )
            })
    })
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
        return Err(Unparsed("a clause that is not Postgres's"));
    }
    if select.into.is_some() { Err(Unparsed("SELECT INTO")) } else { Ok(()) }
}

/// Forgets which inner columns the outputs are; what is known of their values stays true.
fn strip_nodes(outputs: Outputs) -> Outputs {
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
        let same = left.column.as_ref().and_then(|column| column.family) == right.column.as_ref().and_then(|column| column.family);
        Output { column: left.column, node: None, keys: keys.filter(|_| same) }
    });
    Some(both.collect())
}
