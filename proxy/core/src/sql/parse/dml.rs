//! INSERT, UPDATE and DELETE: which rows they touch, and what they do to shard keys.

use sqlparser::ast::{
    Assignment, AssignmentTarget, Delete, Expr, FromTable, Insert, OnConflictAction, OnInsert, Query, SetExpr,
    Statement, TableFactor, TableObject, TableWithJoins, Update, UpdateTableFromKind,
};

use super::analyse::{Analyser, Unparsed, resolve};
use super::env::Env;
use super::from::FromState;
use super::scope::{Columns, Entry, Scope, ident, name_parts};
use super::terms::constant;
use crate::sql::facts::{KeySet, KeySetting, TableName, Use};
use crate::topology::{KeyType, Placement};

impl Analyser<'_> {
    pub fn statement(&mut self, statement: &Statement, scope: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        match statement {
            Statement::Query(query) => self.query(query, scope, env, None).map(|_| ()),
            Statement::Insert(insert) => self.insert(insert, scope, env),
            Statement::Update(update) => self.update(update, scope, env),
            Statement::Delete(delete) => self.delete(delete, scope, env),
            _ => Err(Unparsed("this kind of statement is not analysed")),
        }
    }

    fn shard_key(&self, table: &TableName) -> Option<(String, KeyType)> {
        match self.schema.placement(table) {
            Placement::Sharded { key, key_type } => Some((key.to_string(), *key_type)),
            Placement::Reference | Placement::Global => None,
        }
    }

    fn insert(&mut self, insert: &Insert, outer: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        let TableObject::TableName(name) = &insert.table else {
            return Err(Unparsed("weir cannot read its target table"));
        };
        if insert.or.is_some()
            || insert.replace_into
            || insert.overwrite
            || insert.partitioned.is_some()
            || !insert.after_columns.is_empty()
            || !insert.assignments.is_empty()
            || insert.insert_alias.is_some()
            || insert.multi_table_insert_type.is_some()
        {
            return Err(Unparsed("it has a clause that is not Postgres's"));
        }
        self.level += 1;
        let parts = name_parts(name).ok_or(Unparsed("it has a table name weir cannot read"))?;
        let (owner, columns) = self.relation(&parts, Use::Insert)?;
        let instance = self.instances.len() - 1;
        let table = self.instances[instance].table.clone();
        let key = self.shard_key(&table);
        let position = match &key {
            Some((name, _)) => key_position(insert, name, &columns),
            None => None,
        };
        self.key_position = position;
        // WITH in front of INSERT belongs to the source query, so its names are visible in there only.
        let mut outputs = None;
        if let Some(source) = &insert.source {
            let wanted = position.zip(key.as_ref().map(|key| key.1));
            (self.instances[instance].keys, outputs) = self.insert_source(source, outer, env, wanted)?;
        }
        self.inserted_defaults(insert, &table, outputs);
        if key.is_some() && self.key_setting == KeySetting::Fine {
            if position.is_none() || insert.source.is_none() {
                self.key_setting = KeySetting::Missing;
            } else if self.instances[instance].keys.is_none() {
                self.key_setting = KeySetting::Computed;
            }
        }
        let name = insert
            .table_alias
            .as_ref()
            .map_or_else(|| parts.last().cloned().unwrap_or_default(), |alias| ident(&alias.alias));
        let mut own = Scope::inside(outer);
        own.entries.push(Entry { owner, name, columns: columns.clone() });
        own.entries.push(Entry { owner, name: "excluded".to_owned(), columns });
        if let Some(OnInsert::OnConflict(conflict)) = &insert.on
            && let OnConflictAction::DoUpdate(update) = &conflict.action
        {
            self.updates_conflicts = true;
            self.assigned_defaults(&update.assignments, &table);
            self.conflict_update(&update.assignments, key.as_ref(), instance);
            self.visit_subqueries(&update.assignments, &own, env)?;
            self.visit_subqueries(&update.selection, &own, env)?;
        } else if matches!(insert.on, Some(OnInsert::DuplicateKeyUpdate(_))) {
            return Err(Unparsed("it has a clause that is not Postgres's"));
        }
        self.visit_subqueries(&insert.returning, &own, env)?;
        let own_env = self.keyed_env(env, owner, key.as_ref(), instance);
        self.owners[owner].env = Some(own_env.into());
        self.level -= 1;
        Ok(())
    }

    fn keyed_env(&mut self, env: &Env, owner: usize, key: Option<&(String, KeyType)>, instance: usize) -> Env {
        let mut env = env.clone();
        if let (Some((name, _)), Some(keys)) = (key, self.instances[instance].keys.clone()) {
            let node = self.node(owner, name);
            env.restrict(node, keys);
        }
        env
    }

    /// The keys of the inserted rows, and the number of the source's columns, each if it is known.
    fn insert_source(
        &mut self,
        source: &Query,
        scope: &Scope<'_>,
        env: &Env,
        key: Option<(usize, KeyType)>,
    ) -> Result<(Option<KeySet>, Option<usize>), Unparsed> {
        if let SetExpr::Values(values) = &*source.body
            && source.with.is_none()
            && source.limit_clause.is_none()
            && source.fetch.is_none()
        {
            for row in &values.rows {
                for value in &row.content {
                    self.visit_subqueries(value, scope, env)?;
                }
            }
            let width = values.rows.first().map(|row| row.content.len());
            let Some((position, family)) = key else { return Ok((None, width)) };
            let constants: Option<Vec<_>> =
                values.rows.iter().map(|row| row.content.get(position).and_then(constant)).collect();
            return Ok((constants.and_then(|constants| self.key_set(constants, family)), width));
        }
        let outputs = self.query(source, scope, env, None)?;
        let width = outputs.as_ref().map(Vec::len);
        let Some((position, family)) = key else { return Ok((None, width)) };
        let Some(output) = outputs.and_then(|outputs| outputs.into_iter().nth(position)) else {
            return Ok((None, width));
        };
        let fits = output.column.is_none_or(|column| column.family.is_none_or(|other| other == family));
        Ok((output.keys.filter(|_| fits), width))
    }

    fn conflict_update(&mut self, assignments: &[Assignment], key: Option<&(String, KeyType)>, instance: usize) {
        let Some((key, family)) = key else { return };
        for assignment in assignments {
            if !assigns(assignment, key) {
                continue;
            }
            let excluded = matches!(&assignment.value, Expr::CompoundIdentifier(parts)
                if parts.len() == 2 && ident(&parts[0]) == "excluded" && ident(&parts[1]) == *key);
            let same = constant(&assignment.value)
                .and_then(|constant| self.key_set(vec![constant], *family))
                .is_some_and(|keys| self.instances[instance].keys.as_ref() == Some(&keys));
            if !excluded && !same {
                self.key_setting = KeySetting::Changes;
            }
        }
    }

    fn update(&mut self, update: &Update, outer: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        if update.or.is_some()
            || !update.order_by.is_empty()
            || update.limit.is_some()
            || !update.table.joins.is_empty()
        {
            return Err(Unparsed("it has a clause that is not Postgres's"));
        }
        self.level += 1;
        let around = self.block.replace(update.update_token.0.span.start);
        let mut scope = Scope::inside(outer);
        let mut env = env.clone();
        let owner = self.target(&update.table.relation, Use::Update, &mut scope)?;
        let from: &[TableWithJoins] = match &update.from {
            Some(UpdateTableFromKind::AfterSet(from)) => from,
            Some(UpdateTableFromKind::BeforeSet(_)) => return Err(Unparsed("it has a clause that is not Postgres's")),
            None => &[],
        };
        self.joined(from, update.selection.as_ref(), &mut scope, &mut env)?;
        let instance = self.owners[owner].instance.ok_or(Unparsed("weir cannot read its target table"))?;
        let table = self.instances[instance].table.clone();
        self.assigned_defaults(&update.assignments, &table);
        if let Some((key, family)) = self.shard_key(&table) {
            for assignment in &update.assignments {
                if assigns(assignment, &key) && !self.keeps_key(assignment, (owner, &key, family), &scope, &env) {
                    self.key_setting = KeySetting::Changes;
                }
            }
        }
        self.visit_subqueries(&update.assignments, &scope, &env)?;
        self.visit_subqueries(&update.returning, &scope, &env)?;
        self.block = around;
        self.level -= 1;
        Ok(())
    }

    /// Does `SET key = value` leave the key as it is?
    fn keeps_key(
        &mut self,
        assignment: &Assignment,
        (owner, key, family): (usize, &str, KeyType),
        scope: &Scope<'_>,
        env: &Env,
    ) -> bool {
        if !matches!(assignment.target, AssignmentTarget::ColumnName(_)) {
            return false;
        }
        if let Some(found) = resolve(&assignment.value, scope) {
            return found.entry.owner == owner && found.column.name == key;
        }
        let Some(constant) = constant(&assignment.value) else { return false };
        let Some(keys) = self.key_set(vec![constant], family) else { return false };
        let node = self.node(owner, key);
        env.keys_of(node) == Some(&keys)
    }

    fn delete(&mut self, delete: &Delete, outer: &Scope<'_>, env: &Env) -> Result<(), Unparsed> {
        if !delete.tables.is_empty() || !delete.order_by.is_empty() || delete.limit.is_some() {
            return Err(Unparsed("it has a clause that is not Postgres's"));
        }
        let FromTable::WithFromKeyword(from) = &delete.from else {
            return Err(Unparsed("weir cannot read its target table"));
        };
        let [TableWithJoins { relation, joins }] = from.as_slice() else {
            return Err(Unparsed("weir cannot read its target table"));
        };
        if !joins.is_empty() {
            return Err(Unparsed("weir cannot read its target table"));
        }
        self.level += 1;
        let around = self.block.replace(delete.delete_token.0.span.start);
        let mut scope = Scope::inside(outer);
        let mut env = env.clone();
        self.target(relation, Use::Delete, &mut scope)?;
        self.joined(delete.using.as_deref().unwrap_or_default(), delete.selection.as_ref(), &mut scope, &mut env)?;
        self.visit_subqueries(&delete.returning, &scope, &env)?;
        self.block = around;
        self.level -= 1;
        Ok(())
    }

    /// FROM or USING and WHERE of an UPDATE or DELETE.
    fn joined(
        &mut self,
        from: &[TableWithJoins],
        selection: Option<&Expr>,
        scope: &mut Scope<'_>,
        env: &mut Env,
    ) -> Result<(), Unparsed> {
        let mut state = FromState::for_trees(from);
        for tree in from {
            self.join_tree(tree, scope, env, &mut state)?;
        }
        if let Some(selection) = selection {
            self.learn(selection, scope, env, true);
        }
        self.finish_from(state, scope, env)?;
        if let Some(selection) = selection {
            self.visit_subqueries(selection, scope, env)?;
        }
        Ok(())
    }

    /// The table an UPDATE or DELETE writes.
    fn target(&mut self, factor: &TableFactor, usage: Use, scope: &mut Scope<'_>) -> Result<usize, Unparsed> {
        let TableFactor::Table { name, alias, args: None, .. } = factor else {
            return Err(Unparsed("weir cannot read its target table"));
        };
        let parts = name_parts(name).ok_or(Unparsed("it has a table name weir cannot read"))?;
        let (owner, columns) = self.relation(&parts, usage)?;
        let name = alias.as_ref().map_or_else(|| parts.last().cloned().unwrap_or_default(), |alias| ident(&alias.name));
        self.call(&name);
        scope.entries.push(Entry { owner, name, columns });
        Ok(owner)
    }
}

/// Does the assignment set column `key`?
fn assigns(assignment: &Assignment, key: &str) -> bool {
    let is_key = |name| name_parts(name).is_none_or(|parts| parts.first().is_some_and(|part| part == key));
    match &assignment.target {
        AssignmentTarget::ColumnName(name) => is_key(name),
        AssignmentTarget::Tuple(names) => names.iter().any(is_key),
    }
}

/// Position of the key among the inserted values; `None`: it is not among them, or not known.
fn key_position(insert: &Insert, key: &str, columns: &Columns) -> Option<usize> {
    if insert.columns.is_empty() {
        return match columns {
            Columns::Known(columns) => columns.iter().position(|column| column.name == key),
            Columns::KeyOnly(_) | Columns::Unknown => None,
        };
    }
    insert.columns.iter().position(|column| name_parts(column).is_some_and(|parts| parts == [key]))
}
