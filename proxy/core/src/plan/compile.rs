//! Statement → template: every class of statement in one place, DML by its facts.

mod caching;
mod fill;
mod parts;
mod rows;
mod unique;
mod upsert;
mod wrapped;

use std::sync::Arc;

use self::caching::cacheable;
pub use self::unique::Noting;
pub use self::upsert::Merge;
use self::wrapped::literals_of_options;
use super::bind::{Demand, Keyed, Need, Route, Scatter, Shape};
use super::carry::CarriedKey;
use super::clauses::clauses;
use super::engine;
use super::functions::{Harm, worst};
use super::hidden;
use super::reason::{KeyName, NoCacheReason, PrimaryReason, RouteReason};
use super::refuse;
use super::scatter::{Text, read_scatter};
use super::{Access, Target, Template, Wrap};
use crate::fresh::{Dependency, TableHash};
use crate::sql::class::{Class, Ddl};
use crate::sql::facts::{Facts, Instance, KeySet, KeySetting, Literal, Schema, Spread, TableName, Term, Use, Verb};
use crate::sql::lex::{Token, lex};
use crate::sql::normal::Normal;
use crate::sql::{parse, word};
use crate::topology::catalog::RelationKind;
use crate::topology::catalog::reach::is_system_schema;
use crate::topology::{Placement, Width};

/// A template, and what a cache of templates must know of it.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub template: Template,
    /// Indexes of the lifted literals whose value shaped the template: a cache key must include them.
    pub structural: Vec<u16>,
}

/// Plans one statement. `normal` and `class` must have been made of `sql`, which holds exactly this statement.
pub fn compile(normal: &Normal, class: &Class, sql: &str, schema: &Schema<'_>) -> Compiled {
    let mut original = Vec::new();
    let mut tokens = Vec::new();
    let lexed = lex(sql, &mut original).is_ok() && lex(&normal.text, &mut tokens).is_ok();
    let source = Source { sql, original: &original, text: &normal.text, tokens: &tokens, params: normal.params };
    let mut compiler = Compiler { schema, structural: Vec::new(), params: normal.params };
    let mut filling = None;
    let shape = if !lexed {
        home(Access::Write, RouteReason::Unparsed, true)
    } else {
        match compiler.filling(class, source, normal) {
            Ok(found) => {
                filling = found.map(Arc::new);
                compiler.statement(class, source, normal)
            }
            Err(error) => Shape::refusing(error, Access::Write),
        }
    };
    Compiled { template: Template { class: class.clone(), inner: shape, filling }, structural: compiler.structural }
}

/// The plan of a statement that is not looked into: for where there is one server and nothing else that could answer.
pub fn unread(class: &Class) -> Compiled {
    let shape = home(Access::Write, RouteReason::SingleShard, true);
    Compiled { template: Template { class: class.clone(), inner: shape, filling: None }, structural: Vec::new() }
}

/// One statement as written and as normalised.
#[derive(Clone, Copy)]
struct Source<'t> {
    sql: &'t str,
    original: &'t [Token],
    text: &'t str,
    tokens: &'t [Token],
    params: u16,
}

struct Compiler<'a> {
    schema: &'a Schema<'a>,
    structural: Vec<u16>,
    /// Parameters the client wrote.
    params: u16,
}

/// Instances of a statement by where their tables live.
#[derive(Default)]
struct Placed<'f> {
    sharded: Vec<&'f Instance>,
    reference: Vec<&'f Instance>,
    global: Vec<&'f Instance>,
    system: Vec<&'f Instance>,
}

impl Compiler<'_> {
    fn single(&self) -> bool {
        self.schema.width != Width::Several
    }

    fn lone(&self) -> bool {
        self.schema.width == Width::Lone
    }

    fn everywhere(&self, reason: RouteReason) -> Shape {
        let target = if self.single() { Target::Home } else { Target::All };
        let mut shape = Shape::fixed(target, Access::Write, reason);
        shape.writes.push(Need::Fixed(Dependency::Anything));
        shape
    }

    fn statement(&mut self, class: &Class, source: Source<'_>, normal: &Normal) -> Shape {
        let session = Access::PrimaryRead(PrimaryReason::SessionStatement);
        match class {
            Class::Insert if !self.single() => self.insert(source, normal),
            Class::With { writes: true, .. } if !self.single() => self.with_writes(source, normal),
            Class::Merge if !self.single() => self.upsert(source),
            Class::Select | Class::Values | Class::Insert | Class::Update | Class::Delete | Class::With { .. } => {
                self.data(source, Some(normal))
            }
            Class::Table | Class::Merge | Class::SelectInto | Class::Prepare { .. } | Class::Other => {
                self.unparsed(source, "this kind of statement is not analysed")
            }
            Class::Explain { analyze, inner } => {
                let shape = self.explain(*analyze, *inner, source);
                self.shaped_by_literals(&shape, normal);
                shape
            }
            Class::Declare { .. } => {
                let shape = self.declare(source);
                self.shaped_by_literals(&shape, normal);
                shape
            }
            Class::Copy(copy) => {
                let options = literals_of_options(normal, source);
                let shape = self.copy(copy, source);
                if shape.wrap != Wrap::None {
                    self.structural = options;
                }
                shape
            }
            Class::Ddl(ddl) => self.ddl(ddl, source),
            Class::Truncate | Class::Lock => match self.mentioned(source) {
                Some(_) => self.noted_all(*class == Class::Truncate, self.everywhere(RouteReason::EveryShard)),
                None => home(Access::Write, RouteReason::GlobalTable, true),
            },
            Class::Call | Class::Do => self.code(source),
            // What was prepared becomes visible by another statement, maybe of another session.
            Class::PrepareTransaction | Class::CommitPrepared | Class::RollbackPrepared => {
                home(Access::Write, RouteReason::SessionStatement, true)
            }
            Class::Load | Class::Execute { .. } => home(Access::Write, RouteReason::SessionStatement, true),
            Class::Listen(_) | Class::Unlisten(_) | Class::Notify(_) | Class::Discard(_) => {
                home(Access::Write, RouteReason::SessionStatement, false)
            }
            _ => home(session, RouteReason::SessionStatement, false),
        }
    }

    /// A query inside another statement: which of its literals shaped the merge is not told apart.
    fn shaped_by_literals(&mut self, shape: &Shape, normal: &Normal) {
        if matches!(&shape.scatter, Ok(Scatter { read: Some(read) }) if read.compared_literals) {
            self.structural = (0..normal.literals.len() as u16).collect();
        }
    }

    fn ddl(&self, ddl: &Ddl, source: Source<'_>) -> Shape {
        if !self.single()
            && (ddl.temporary || ddl.what == "CREATE TABLE")
            && let Some(name) = hidden::created_from(source.text, source.tokens, self.schema)
        {
            return Shape::refusing(refuse::created_from(&name), Access::Write);
        }
        if ddl.temporary {
            return home(Access::Write, RouteReason::Temporary, false);
        }
        self.everywhere(RouteReason::EveryShard)
    }

    /// CALL and DO.
    fn code(&self, source: Source<'_>) -> Shape {
        let named = |token: &Token| word::name(source.text, *token);
        let called = || {
            let mut names = source.tokens.iter().filter_map(named);
            names.find_map(|name| hidden::function_refusal(&name, self.schema))
        };
        let inside = || hidden::named_anywhere(source.sql, self.schema).map(|name| refuse::block(&name));
        match Some(()).filter(|()| !self.single()).and_then(|()| called().or_else(inside)) {
            Some(error) => Shape::refusing(error, Access::Write),
            None => {
                let mut shape = home(Access::Write, RouteReason::SessionStatement, true);
                self.note_late(&mut shape);
                shape
            }
        }
    }

    /// A word of the text that is the name of a sharded or reference table, or of what leads to one.
    fn mentioned(&self, source: Source<'_>) -> Option<String> {
        hidden::named(source.text, source.tokens, self.schema)
    }

    fn unparsed(&self, source: Source<'_>, why: &str) -> Shape {
        let mut shape = match self.mentioned(source) {
            Some(table) if !self.single() => Shape::refusing(refuse::unparsed(why, &table), Access::Write),
            _ => home(Access::Write, RouteReason::Unparsed, true),
        };
        self.note_unread(&mut shape);
        shape.cacheable = Err(NoCacheReason::Unparsed);
        shape.engine = !self.single() && engine::reads_by_words(source.text, source.tokens, self.schema);
        shape
    }

    /// SELECT, VALUES, INSERT, UPDATE, DELETE.
    fn data(&mut self, source: Source<'_>, normal: Option<&Normal>) -> Shape {
        let facts = match parse::facts(source.text, source.tokens, source.params, self.schema) {
            Ok(facts) => facts,
            Err(parse::Unparsed(why)) => return self.unparsed(source, why),
        };
        let mut shape = self.routed(&facts, source);
        shape.client_params = source.params;
        shape.ambiguous.clone_from(&facts.ambiguous_params);
        self.needs(&facts.instances, &mut shape);
        if facts.updates_conflicts {
            self.conflict_needs(&facts.instances, &mut shape);
        }
        let harm = worst(&facts.functions, self.schema.catalog);
        self.note_unique(&facts.instances, source, &mut shape);
        if harm == Harm::Unknown {
            self.note_late(&mut shape);
            shape.writes.push(Need::Fixed(Dependency::Anything));
        }
        shape.cacheable = cacheable(&facts, harm, source, &shape).and_then(|()| self.allows_caching(&facts.instances));
        shape.stale_ms = shape.cacheable.ok().and_then(|()| self.allows_stale(&facts.instances));
        shape.engine = !self.single() && engine::reads(&facts, source.text, source.tokens, self.schema);
        if let (Some(normal), Ok(Scatter { read: Some(read) })) = (normal, &shape.scatter)
            && read.compared_literals
        {
            self.structural.extend(structural(normal, source));
        }
        shape
    }

    fn place<'f>(&self, facts: &'f Facts) -> Placed<'f> {
        let mut placed = Placed::default();
        for instance in &facts.instances {
            let list = match self.schema.placement(&instance.table) {
                Placement::Sharded { .. } => &mut placed.sharded,
                Placement::Reference => &mut placed.reference,
                Placement::Global if is_system(&instance.table) => &mut placed.system,
                Placement::Global if hidden::is_reference_view(&instance.table, self.schema) => &mut placed.reference,
                Placement::Global => &mut placed.global,
            };
            list.push(instance);
        }
        placed
    }

    fn access(&self, facts: &Facts) -> Access {
        let writes = facts.instances.iter().any(|instance| instance.usage.is_write());
        let harm = worst(&facts.functions, self.schema.catalog);
        if writes || harm >= Harm::Volatile {
            return Access::Write;
        }
        if facts.locks_rows {
            return Access::PrimaryRead(PrimaryReason::RowLocks);
        }
        if facts.server_bound || facts.instances.is_empty() && harm >= Harm::Stable {
            return Access::PrimaryRead(PrimaryReason::ServerBound);
        }
        let all: Vec<&Instance> = facts.instances.iter().collect();
        self.read_access(&all, true)
    }

    fn read_access(&self, instances: &[&Instance], system: bool) -> Access {
        for instance in instances {
            let reason = match self.schema.relation(&instance.table).map(|relation| relation.kind) {
                Some(RelationKind::PlainTable) => continue,
                Some(_) => PrimaryReason::NotPlainTable,
                None if system && is_system(&instance.table) => PrimaryReason::SystemCatalog,
                None => PrimaryReason::UnknownRelation,
            };
            return Access::PrimaryRead(reason);
        }
        Access::Read
    }

    fn routed(&mut self, facts: &Facts, source: Source<'_>) -> Shape {
        let access = self.access(facts);
        let placed = self.place(facts);
        let fixed = |target, reason| Shape::fixed(target, access, reason);
        if self.single() {
            return fixed(Target::Home, RouteReason::SingleShard);
        }
        if let Some(error) = hidden::refusal(facts, self.schema) {
            return Shape::refusing(error, access);
        }
        if let Some(target) = placed.reference.iter().find(|instance| instance.usage.is_write()) {
            return self.reference_write(facts, &placed, target, access);
        }
        if !placed.sharded.is_empty() {
            return self.keyed(facts, &placed, access, source);
        }
        if !placed.global.is_empty() {
            return fixed(Target::Home, RouteReason::GlobalTable);
        }
        if !placed.system.is_empty() {
            return fixed(Target::Home, RouteReason::SystemCatalog);
        }
        if !placed.reference.is_empty() {
            let target = if access == Access::Read { Target::Any } else { Target::Home };
            return fixed(target, RouteReason::ReferenceRead);
        }
        match access {
            Access::Read => fixed(Target::Any, RouteReason::NoTable),
            Access::PrimaryRead(_) | Access::Write => fixed(Target::Home, RouteReason::ServerFunction),
        }
    }

    fn reference_write(&self, facts: &Facts, placed: &Placed<'_>, target: &Instance, access: Access) -> Shape {
        let refused = |error| Shape::refusing(error, access);
        let others = placed.sharded.iter().chain(&placed.global).chain(&placed.system);
        if let Some(other) = others.into_iter().next() {
            return refused(refuse::reference_mixed(&target.table, &other.table));
        }
        let unsteady = facts.functions.iter().find(|function| {
            worst(std::slice::from_ref(*function), self.schema.catalog) >= Harm::Stable
                && !super::functions::steady(&function.name)
        });
        if let Some(function) = unsteady {
            return refused(refuse::reference_function(&target.table, &function.name));
        }
        if let Some((table, column)) = facts.differing_defaults.first() {
            return refused(refuse::reference_default(table, column));
        }
        if placed.reference.iter().any(|instance| self.schema.placement(&instance.table) == &Placement::Global) {
            return refused(refuse::reference_shape(&target.table, "a view, whose rows may come in another order"));
        }
        if facts.limited_subquery {
            return refused(refuse::reference_shape(&target.table, "a sub-query that returns only some of its rows"));
        }
        if facts.writes_in_with {
            return refused(refuse::reference_shape(&target.table, "a write inside WITH"));
        }
        if facts.server_bound {
            return refused(refuse::reference_shape(&target.table, "a column that differs between servers"));
        }
        Shape::fixed(Target::All, access, RouteReason::ReferenceWrite)
    }

    fn keyed(&mut self, facts: &Facts, placed: &Placed<'_>, access: Access, source: Source<'_>) -> Shape {
        let refused = |error| Shape::refusing(error, access);
        let written = placed.sharded.iter().find(|instance| instance.usage.is_write());
        let subject = written
            .or_else(|| placed.sharded.iter().find(|instance| instance.keys.is_none()))
            .unwrap_or(&placed.sharded[0]);
        let table = &subject.table;
        let Placement::Sharded { key: column, .. } = self.schema.placement(table) else {
            return self.unparsed(source, "its tables changed meanwhile");
        };
        if let Some(system) = placed.system.first() {
            return refused(refuse::system_mixed(&system.table));
        }
        let stays = if facts.verb == Verb::Insert { self.stays(facts, placed, source) } else { Err(String::new()) };
        match facts.key_setting {
            KeySetting::Fine => {}
            KeySetting::Computed if stays.is_ok() => {}
            KeySetting::Changes => return self.moves(source, (table, column), access),
            KeySetting::Missing => return refused(refuse::key_missing(table, column)),
            KeySetting::Computed => return refused(refuse::key_computed(table, column)),
        }
        if let Some((table, column)) = facts.differing_defaults.first() {
            return refused(refuse::sequence_default(table, column));
        }
        let mut shape = Shape::fixed(Target::All, access, RouteReason::Scatter);
        let (mut core, mut inserted) = (None, None);
        for instance in &placed.sharded {
            let Some(demand) = self.demand(instance, &mut shape.demands) else { continue };
            if instance.usage == Use::Insert {
                inserted = Some(demand);
            }
            if instance.spread == Spread::Core {
                core.get_or_insert(demand);
            }
        }
        shape.scatter = match stays {
            Ok(()) => Ok(Scatter { read: None }),
            Err(_) => self.scatter(facts, placed, source).map_err(Into::into),
        };
        shape.deal = self.deal(facts, placed, source, inserted).map(Arc::new).map_err(Into::into);
        if inserted.is_some() {
            shape.carried_key = CarriedKey::of(table, self.schema).map(Arc::new);
        }
        shape.route = Route::Keyed(Keyed {
            table: table.clone(),
            column: column.clone(),
            home_table: placed.global.first().map(|instance| instance.table.clone()),
            insert: placed.sharded.iter().any(|instance| instance.usage == Use::Insert),
            varchar: self.schema.is_varchar(table, column),
            everywhere: placed.sharded.iter().all(|instance| instance.keys.is_some()),
            core,
        });
        shape
    }

    /// The index of the instance's keys among the demands; `None` if it has none.
    fn demand(&self, instance: &Instance, demands: &mut Vec<Demand>) -> Option<usize> {
        let Placement::Sharded { key, key_type } = self.schema.placement(&instance.table) else { return None };
        let keys = instance.keys.as_ref()?;
        let found = demands.iter().position(|demand| demand.key_type == *key_type && demand.keys == *keys);
        Some(found.unwrap_or_else(|| {
            let name = KeyName {
                table: instance.table.to_string().into(),
                column: key.clone(),
                value: shown(keys, self.params).into(),
            };
            demands.push(Demand { name: Arc::new(name), key_type: *key_type, keys: keys.clone() });
            demands.len() - 1
        }))
    }

    /// May the statement run on several shards? `Err`: why not.
    fn scatter(&self, facts: &Facts, placed: &Placed<'_>, source: Source<'_>) -> Result<Scatter, String> {
        if facts.verb == Verb::Insert {
            return Err("it inserts rows".into());
        }
        if facts.writes_in_with {
            return Err("it writes inside WITH".into());
        }
        if let Some(table) = placed.global.first() {
            return Err(format!("{} lives on the home shard only", table.table));
        }
        if let Some(view) = placed.reference.iter().find(|one| self.schema.placement(&one.table) == &Placement::Global)
        {
            return Err(format!("{} is a view, which may choose other rows on each shard", view.table));
        }
        if let Some(why) = facts.unspreadable {
            return Err(format!("it has {why}"));
        }
        let core = placed.sharded.iter().find(|instance| instance.spread == Spread::Core);
        for instance in &placed.sharded {
            if instance.spread == Spread::Free {
                return Err(match core {
                    Some(core) if core.table != instance.table => {
                        format!("{} is not joined to {} by the shard keys", instance.table, core.table)
                    }
                    _ if placed.sharded.len() > 1 => format!("{} is not joined by its shard key", instance.table),
                    _ => format!("the rows of {} cannot be told apart by shard where it stands", instance.table),
                });
            }
        }
        if core.is_none() {
            return Err("no sharded table in it decides which rows there are".into());
        }
        if facts.locks_rows {
            return Err("it locks rows".into());
        }
        if facts.limited_subquery {
            return Err("it has a sub-query that returns only some of its rows".into());
        }
        if facts.server_bound {
            return Err("it asks for what differs between servers (ctid, xmin, TABLESAMPLE)".into());
        }
        if worst(&facts.functions, self.schema.catalog) >= Harm::Volatile {
            return Err("it calls a function that is not known to be harmless".into());
        }
        if facts.verb != Verb::Select {
            let target_is_core =
                placed.sharded.iter().any(|instance| instance.usage.is_write() && instance.spread == Spread::Core);
            return if target_is_core { Ok(Scatter { read: None }) } else { Err("its target is not spread".into()) };
        }
        let shape = facts.select.as_ref().ok_or("it is not a single SELECT")?;
        let clauses = clauses(source.sql, source.original).ok_or("weir cannot tell its clauses apart")?;
        let text = Text { sql: source.sql, tokens: source.original, clauses: &clauses };
        Ok(Scatter { read: Some(Box::new(read_scatter(shape, text)?)) })
    }

    /// ON CONFLICT DO UPDATE may change a row of another key, where a unique index does not hold the key.
    fn conflict_needs(&self, instances: &[Instance], shape: &mut Shape) {
        for instance in instances.iter().filter(|instance| instance.usage == Use::Insert) {
            let Placement::Sharded { key, .. } = self.schema.placement(&instance.table) else { continue };
            let keyed = |columns: &Vec<Box<str>>| columns.contains(key);
            if !self.schema.relation(&instance.table).is_some_and(|relation| relation.unique_columns.iter().all(keyed))
            {
                let table = table_hash(&instance.table);
                shape.writes.push(Need::Fixed(Dependency::Table(table)));
                shape.writes.push(Need::Fixed(Dependency::Keyless(table)));
            }
        }
    }

    /// Fills in what is read and written, for freshness.
    fn needs(&self, instances: &[Instance], shape: &mut Shape) {
        for instance in instances {
            let relation = self.schema.relation(&instance.table);
            let plain = relation.is_some_and(|relation| relation.kind == RelationKind::PlainTable);
            let table = table_hash(&instance.table);
            let demand = self.demand(instance, &mut shape.demands);
            if !instance.usage.is_write() {
                shape.reads.push(Need::Fixed(Dependency::Anything));
                match demand {
                    _ if !plain => {}
                    Some(demand) => shape.reads.push(Need::Keyed { table, demand, write: false }),
                    None => shape.reads.push(Need::Fixed(Dependency::Table(table))),
                }
            } else if !plain || relation.is_some_and(|relation| relation.writes_spread) {
                shape.writes.push(Need::Fixed(Dependency::Anything));
            } else if let Some(demand) = demand {
                shape.writes.push(Need::Keyed { table, demand, write: true });
            } else {
                shape.writes.push(Need::Fixed(Dependency::Table(table)));
                shape.writes.push(Need::Fixed(Dependency::Keyless(table)));
            }
        }
    }
}

/// At the home shard; `anything`: what it writes is not known.
fn home(access: Access, reason: RouteReason, anything: bool) -> Shape {
    let mut shape = Shape::fixed(Target::Home, access, reason);
    if anything {
        shape.writes.push(Need::Fixed(Dependency::Anything));
    }
    shape
}

/// Literals in the select list: whether an ORDER BY or GROUP BY expression is one of its items depends on their values.
fn structural(normal: &Normal, source: Source<'_>) -> Vec<u16> {
    let Some(clauses) = clauses(source.sql, source.original) else {
        return (0..normal.literals.len() as u16).collect();
    };
    let (Some(first), Some(last)) = (clauses.items.first(), clauses.items.last()) else { return Vec::new() };
    let start = source.original[first.start].start;
    let end = source.original[last.end - 1].end;
    let inside = |(index, literal): (usize, &crate::sql::normal::Literal)| {
        (literal.start >= start && literal.end <= end).then_some(index as u16)
    };
    normal.literals.iter().enumerate().filter_map(inside).collect()
}

fn is_system(table: &TableName) -> bool {
    is_system_schema(&table.schema)
}

fn table_hash(table: &TableName) -> TableHash {
    TableHash::of(&table.schema, &table.name)
}

/// A key set as people read it; literals are not shown, because templates are shared by all their values.
fn shown(keys: &KeySet, params: u16) -> String {
    let value = |number: u16| match number.checked_sub(params) {
        None | Some(0) => format!("${number}"),
        Some(lifted) => format!("literal {lifted}"),
    };
    let term = |term: &Term| match term {
        Term::Param { number, negated } => format!("{}{}", if *negated { "-" } else { "" }, value(*number)),
        Term::Array { number } => format!("any of {}", value(*number)),
        Term::Literal(Literal::Number(text)) => text.to_string(),
        Term::Literal(Literal::String(text)) => format!("'{text}'"),
        Term::ArrayLiteral(text) => format!("any of '{text}'"),
        Term::Null => "NULL".to_owned(),
    };
    const SHOWN_MAX: usize = 4;
    let mut parts: Vec<String> = keys.terms.iter().take(SHOWN_MAX).map(term).collect();
    if keys.terms.len() > SHOWN_MAX {
        parts.push("…".to_owned());
    }
    parts.join(" or ")
}
