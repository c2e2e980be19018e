//! FROM lists: relations, joins, sub-queries, functions.
//!
//! What holds for the rows of an outer join's null-extended side is kept in an env of its own, so that its ON condition
//! never says anything of the preserved side.

use std::rc::Rc;

use sqlparser::ast::{Expr, JoinConstraint, JoinOperator, Query, TableAlias, TableFactor, TableWithJoins};

use super::analyse::{Analyser, Unparsed};
use super::block::{strip_nodes, transparent};
use super::env::{Env, NodeId};
use super::scope::{Columns, Entry, Scope, ident, name_parts};
use crate::sql::facts::Use;

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
                return Err(Unparsed("it has a join that is not Postgres's"));
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
            _ => return Err(Unparsed("it has a join that is not Postgres's")),
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
                    let [name] = name_parts(column)
                        .ok_or(Unparsed("weir cannot read its USING"))?
                        .try_into()
                        .map_err(|_| Unparsed("weir cannot read its USING"))?;
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
            JoinConstraint::Natural => {
                return Err(Unparsed("it has a NATURAL JOIN, whose columns depend on the catalogue"));
            }
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
            let mut found =
                scope.entries.iter().filter(|entry| owners.contains(&entry.owner) && entry.columns.get(name).is_some());
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
                    let parts = name_parts(name).ok_or(Unparsed("it has a table name weir cannot read"))?;
                    return Ok(vec![self.opaque(parts.last().map_or("", String::as_str), alias.as_ref(), scope)]);
                }
                self.table(
                    name_parts(name).ok_or(Unparsed("it has a table name weir cannot read"))?,
                    alias.as_ref(),
                    scope,
                    env,
                )
            }
            TableFactor::Derived { lateral, subquery, alias, .. } => {
                self.derived(subquery, (*lateral, alias.as_ref()), scope, env, from)
            }
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                self.join_tree(table_with_joins, scope, env, from)
            }
            TableFactor::Function { name, args, alias, .. } => {
                self.visit_subqueries(args, scope, env)?;
                let parts = name_parts(name).ok_or(Unparsed("it has a function name weir cannot read"))?;
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
            _ => Err(Unparsed("it has an item in FROM that weir does not know")),
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
        if !renames {
            self.call(&name);
        }
        scope.entries.push(Entry { owner, name, columns });
        Ok(vec![owner])
    }

    /// The relation added last goes by this name.
    pub fn call(&mut self, name: &str) {
        if let Some(draft) = self.instances.last_mut() {
            draft.called = Some(name.to_owned());
        }
    }

    pub fn relation(&mut self, parts: &[String], usage: Use) -> Result<(usize, Columns), Unparsed> {
        let table = match parts {
            [name] => self.schema.resolve(None, name),
            [schema, name] | [_, schema, name] => self.schema.resolve(Some(schema), name),
            _ => return Err(Unparsed("it has a table name weir cannot read")),
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
        let renamed: Vec<String> =
            alias.iter().flat_map(|alias| &alias.columns).map(|column| ident(&column.name)).collect();
        if !from.has_outer
            && !lateral
            && let Some(select) = transparent(subquery, self.schema.catalog)
        {
            let mut inner = Scope { parent: scope.parent, ..Scope::default() };
            let around = self.block.replace(select.select_token.0.span.start);
            for tree in &select.from {
                self.join_tree(tree, &mut inner, env, from)?;
            }
            self.block = around;
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
}

/// Is any row of the FROM list possibly null-extended?
pub fn has_outer_join(from: &[TableWithJoins]) -> bool {
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
