//! Which tables to spread, by which keys: proposed from the statements an application sends and the schema it has.
//!
//! Every candidate is judged by the planner itself: the statements are planned as if the tables were declared so, on sixteen
//! shards, and their calls are counted by where they would run. Candidates come from the schema: the tables that lead to one
//! table's primary key by foreign keys, or by columns that are called like its key. The best is taken, then the next, as long
//! as more calls stay on one shard for it.
//! Non-goals: how much data a shard would hold, how skewed a key is, and declaring anything.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{Epoch, ShardId, Slot};
use crate::plan::{Datum, Plan, Schema, Target, Values, compile};
use crate::sql::class::{Class, classify};
use crate::sql::facts::family;
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::normal::{Normal, normalize};
use crate::topology::catalog::{Catalog, Relation, RelationKind};
use crate::topology::{KeyType, Placement, SlotMap, TableRules, Topology, Width};

/// So many that two keys are rarely on the same one.
const SHARDS: u16 = 16;
/// The most called ones decide.
const DIGESTS_MAX: usize = 500;
/// Proposals with more entities than this are nobody's wish.
const ENTITIES_MAX: usize = 8;

/// Schema and name.
pub type TableId = (Box<str>, Box<str>);

/// One shape of statement, as `pg_stat_statements` or a log has it, and how often it was called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digest {
    pub sql: String,
    pub calls: u64,
}

/// A foreign key of one column, or one column of a longer one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    pub table: TableId,
    pub column: Box<str>,
    pub referenced: TableId,
    pub referenced_column: Box<str>,
}

/// Where the calls of a statement would run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// On the shard of its key.
    OneShard,
    /// On any shard: it reads reference tables, or none.
    AnyShard,
    /// Always on the home shard.
    Home,
    /// On several shards, and the answers are merged.
    Merged,
    /// On the fallback engine.
    Engine,
    /// A write on several shards, committed in two phases.
    Everywhere,
    Refused,
}

impl Outcome {
    pub const ALL: [Outcome; 7] = [
        Outcome::OneShard,
        Outcome::AnyShard,
        Outcome::Home,
        Outcome::Merged,
        Outcome::Engine,
        Outcome::Everywhere,
        Outcome::Refused,
    ];

    pub fn meaning(self) -> &'static str {
        match self {
            Outcome::OneShard => "one shard, by its key",
            Outcome::AnyShard => "any shard",
            Outcome::Home => "the home shard",
            Outcome::Merged => "several shards, merged",
            Outcome::Engine => "the fallback engine",
            Outcome::Everywhere => "a write on several shards",
            Outcome::Refused => "refused",
        }
    }

    /// What one call is worth. Statements at home are no loss, but they do not scale.
    fn worth(self) -> i64 {
        match self {
            Outcome::OneShard | Outcome::AnyShard => 10,
            Outcome::Home => 0,
            Outcome::Merged => -5,
            Outcome::Engine | Outcome::Everywhere => -10,
            Outcome::Refused => -30,
        }
    }
}

/// A table that is to be declared, and why so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Declaration {
    pub table: TableId,
    pub placement: Placement,
    pub why: String,
}

/// The proposal and what it does to the statements.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Advice {
    pub tables: Vec<Declaration>,
    /// Calls by outcome, in order of [`Outcome::ALL`].
    pub calls: Vec<(Outcome, u64)>,
    /// What does not stay on one shard, most called first.
    pub elsewhere: Vec<(Outcome, Digest)>,
    /// Statements that say nothing of tables, or that weir does not plan.
    pub skipped: u64,
}

impl Advice {
    pub fn rules(&self) -> TableRules {
        let mut rules = TableRules::default();
        for Declaration { table, placement, .. } in &self.tables {
            rules.insert(&table.0, &table.1, placement.clone());
        }
        rules
    }
}

/// Proposes declarations for the tables of `catalog`.
pub fn advise(digests: &[Digest], links: &[Link], catalog: &Catalog, search_path: &[Box<str>]) -> Advice {
    let workload = Workload::new(digests, catalog, search_path);
    let mut taken: Vec<Declaration> = Vec::new();
    // Copies everywhere are no reason to have shards: what they give alone, a proposal must surpass.
    let mut best = workload.with_references(&mut Vec::new());
    let groups = groups(links, catalog);
    for _ in 0..ENTITIES_MAX {
        let mut winner = None;
        for group in &groups {
            let mut trial = taken.clone();
            trial.extend(group.iter().filter(|one| !declares(&taken, &one.table)).cloned());
            if trial.len() == taken.len() {
                continue;
            }
            let worth = workload.with_references(&mut trial);
            if worth > best {
                best = worth;
                winner = Some(trial);
            }
        }
        match winner {
            Some(trial) => taken = trial,
            None => break,
        }
    }
    taken.sort_by(|one, other| one.table.cmp(&other.table));
    workload.report(taken)
}

fn declares(declarations: &[Declaration], table: &TableId) -> bool {
    declarations.iter().any(|declaration| declaration.table == *table)
}

/// For every table with a primary key of one column that can be a shard key: all tables that can be spread by it.
fn groups(links: &[Link], catalog: &Catalog) -> Vec<Vec<Declaration>> {
    tables(catalog)
        .filter_map(|(table, relation)| {
            let (key, key_type) = own_key(relation)?;
            let why = format!("{key} is its key");
            let mut group = vec![declaration(&table, &key, key_type, why)];
            follow_links(&mut group, links, catalog);
            follow_names(&mut group, &key, key_type, catalog);
            Some(group)
        })
        .collect()
}

fn tables(catalog: &Catalog) -> impl Iterator<Item = (TableId, &Relation)> {
    let all = catalog.relations.iter().flat_map(|(schema, relations)| {
        relations.iter().map(move |(name, relation)| ((schema.clone(), name.clone()), relation))
    });
    all.filter(|(_, relation)| matches!(relation.kind, RelationKind::PlainTable | RelationKind::OtherTable))
}

/// A unique column that is never null and whose type can be a shard key.
fn own_key(relation: &Relation) -> Option<(Box<str>, KeyType)> {
    let mut single = relation.unique_columns.iter().filter(|columns| columns.len() == 1).map(|columns| &columns[0]);
    single.find_map(|name| key_column(relation, name).map(|key_type| (name.clone(), key_type)))
}

fn key_column(relation: &Relation, name: &str) -> Option<KeyType> {
    let column = relation.columns.iter().find(|column| &*column.name == name && column.not_null)?;
    family(column.type_oid)
}

fn declaration(table: &TableId, key: &str, key_type: KeyType, why: String) -> Declaration {
    Declaration { table: table.clone(), placement: Placement::Sharded { key: key.into(), key_type }, why }
}

/// Tables whose foreign keys lead to a key of the group.
fn follow_links(group: &mut Vec<Declaration>, links: &[Link], catalog: &Catalog) {
    loop {
        let next = links.iter().find_map(|link| {
            if declares(group, &link.table) {
                return None;
            }
            let parent = group.iter().find(|one| one.table == link.referenced)?;
            let Placement::Sharded { key, key_type } = &parent.placement else { return None };
            let relation = catalog.relation(&link.table.0, &link.table.1)?;
            let fits = *key == link.referenced_column && key_column(relation, &link.column) == Some(*key_type);
            let why = || format!("{} refers to {}", link.column, parent.table.1);
            fits.then(|| declaration(&link.table, &link.column, *key_type, why()))
        });
        match next {
            Some(next) => group.push(next),
            None => return,
        }
    }
}

/// Tables without such a foreign key that have a column called like a key of the group, where every unique constraint holds it:
/// others are found by something else. A bare `id` says nothing.
fn follow_names(group: &mut Vec<Declaration>, own: &str, own_type: KeyType, catalog: &Catalog) {
    let mut names: BTreeSet<Box<str>> = BTreeSet::new();
    for one in group.iter() {
        if let Placement::Sharded { key, .. } = &one.placement {
            names.insert(key.clone());
        }
    }
    if own == "id" {
        let table = &group[0].table.1;
        names.insert(format!("{}_id", table.strip_suffix('s').unwrap_or(table)).into());
    }
    names.remove("id");
    for (table, relation) in tables(catalog) {
        if declares(group, &table) {
            continue;
        }
        let everywhere = |name| relation.unique_columns.iter().all(|columns| columns.contains(name));
        let mut candidates = names.iter().filter(|name| key_column(relation, name) == Some(own_type));
        if let Some(name) = candidates.find(|name| everywhere(*name)) {
            let why = format!("{name} is called like the key of {}", group[0].table.1);
            group.push(declaration(&table, name, own_type, why));
        }
    }
}

/// The statements, ready to be planned again and again.
struct Workload<'a> {
    statements: Vec<Statement<'a>>,
    catalog: &'a Catalog,
    search_path: &'a [Box<str>],
    skipped: u64,
    /// Tables that statements name.
    named: BTreeSet<TableId>,
}

struct Statement<'a> {
    digest: &'a Digest,
    /// With values in the places where only literals are allowed.
    sql: String,
    normal: Normal,
    class: Class,
}

impl<'a> Workload<'a> {
    fn new(digests: &'a [Digest], catalog: &'a Catalog, search_path: &'a [Box<str>]) -> Self {
        let mut workload =
            Workload { statements: Vec::new(), catalog, search_path, skipped: 0, named: BTreeSet::new() };
        let mut sorted: Vec<&Digest> = digests.iter().collect();
        sorted.sort_by_key(|digest| std::cmp::Reverse(digest.calls));
        for (number, digest) in sorted.into_iter().enumerate() {
            match Statement::read(digest).filter(|_| number < DIGESTS_MAX) {
                Some(statement) => workload.statements.push(statement),
                None => workload.skipped += digest.calls,
            }
        }
        let visible = tables(catalog).map(|(table, _)| table).filter(|table| search_path.contains(&table.0));
        let named = visible.filter(|table| workload.statements.iter().any(|statement| statement.names(&table.1)));
        workload.named = named.collect();
        workload
    }

    fn schema<'s>(&'s self, rules: &'s TableRules) -> Schema<'s> {
        Schema { rules, catalog: self.catalog, search_path: self.search_path, width: Width::Several }
    }

    fn outcomes(&self, declarations: &[Declaration]) -> Vec<Outcome> {
        let rules = Advice { tables: declarations.to_vec(), ..Advice::default() }.rules();
        let topology = Topology {
            epoch: Epoch(1),
            shards: (0..SHARDS).map(|shard| format!("shard{shard}").into()).collect(),
            slots: SlotMap::new((0..Slot::COUNT).map(|slot| ShardId(slot as u16 % SHARDS)).collect())
                .unwrap_or_else(|| SlotMap::single(ShardId(0))),
            tables: std::sync::Arc::new(rules.clone()),
            home: ShardId(0),
            moves: crate::topology::moves::Moves::default(),
            roster: crate::topology::Roster::fixed(usize::from(SHARDS)),
        };
        let schema = self.schema(&rules);
        self.statements.iter().map(|statement| statement.outcome(&schema, &topology)).collect()
    }

    fn worth(&self, declarations: &[Declaration]) -> i64 {
        let outcomes = self.outcomes(declarations);
        let each = outcomes.iter().zip(&self.statements);
        each.map(|(outcome, statement)| outcome.worth().saturating_mul(statement.digest.calls as i64)).sum()
    }

    /// Adds every table whose copy on each shard makes the trial better. Gives its worth.
    fn with_references(&self, trial: &mut Vec<Declaration>) -> i64 {
        let mut best = self.worth(trial);
        for table in self.named.iter().filter(|table| !declares(trial, table)).cloned().collect::<Vec<_>>() {
            let why = "read together with spread tables, and seldom written".to_owned();
            trial.push(Declaration { table, placement: Placement::Reference, why });
            let worth = self.worth(trial);
            if worth > best {
                best = worth;
            } else {
                trial.pop();
            }
        }
        best
    }

    fn report(&self, tables: Vec<Declaration>) -> Advice {
        let mut calls: BTreeMap<Outcome, u64> = BTreeMap::new();
        let mut elsewhere = Vec::new();
        for (outcome, statement) in self.outcomes(&tables).into_iter().zip(&self.statements) {
            *calls.entry(outcome).or_default() += statement.digest.calls;
            if outcome > Outcome::AnyShard {
                elsewhere.push((outcome, statement.digest.clone()));
            }
        }
        let calls = Outcome::ALL.into_iter().map(|outcome| (outcome, calls.get(&outcome).copied().unwrap_or(0)));
        Advice { tables, calls: calls.collect(), elsewhere, skipped: self.skipped }
    }
}

impl<'a> Statement<'a> {
    /// `None` for what is not about rows.
    fn read(digest: &'a Digest) -> Option<Self> {
        let sql = with_literals(&digest.sql)?;
        let mut tokens = Vec::new();
        lex(&sql, &mut tokens).ok()?;
        let class = classify(&sql, &tokens);
        let rows = matches!(
            class,
            Class::Select | Class::Values | Class::Insert | Class::Update | Class::Delete | Class::With { .. }
        );
        let mut normal = Normal::default();
        normalize(&sql, &tokens, &mut normal);
        rows.then_some(Statement { digest, sql, normal, class })
    }

    fn names(&self, table: &str) -> bool {
        let mut tokens = Vec::new();
        let lexed = lex(&self.sql, &mut tokens).is_ok();
        lexed && tokens.iter().any(|token| crate::sql::word::name(&self.sql, *token).is_some_and(|name| name == table))
    }

    fn outcome(&self, schema: &Schema<'_>, topology: &Topology) -> Outcome {
        let compiled = compile(&self.normal, &self.class, &self.sql, schema);
        // Every parameter gets a value of its own, of whatever type its key has.
        let values = |value: fn(u16) -> String| (1..=self.normal.params).map(value).collect::<Vec<String>>();
        let kinds =
            [values(|number| number.to_string()), values(|number| format!("{number:08x}-0000-4000-8000-000000000000"))];
        let bound = kinds.iter().map(|texts| {
            let params: Vec<Datum<'_>> = texts.iter().map(|text| Datum::Text(text.as_bytes())).collect();
            let values = Values { params: &params, sql: &self.sql, literals: &self.normal.literals };
            compiled.template.bind(&values, topology)
        });
        bound.flatten().next().map_or(Outcome::Refused, |plan| of_plan(&plan, compiled.template.is_write()))
    }
}

fn of_plan(plan: &Plan, write: bool) -> Outcome {
    match &plan.target {
        Target::Home => Outcome::Home,
        Target::One(_) => Outcome::OneShard,
        Target::Any => Outcome::AnyShard,
        Target::Engine => Outcome::Engine,
        Target::Many(_) | Target::All if write => Outcome::Everywhere,
        Target::Many(_) | Target::All => Outcome::Merged,
    }
}

/// `pg_stat_statements` writes `$n` for every literal, also where the grammar wants one: `interval $1`.
fn with_literals(sql: &str) -> Option<String> {
    const TYPED: [&str; 5] = ["interval", "date", "time", "timestamp", "timestamptz"];
    let mut tokens: Vec<Token> = Vec::new();
    lex(sql, &mut tokens).ok()?;
    let mut text = String::with_capacity(sql.len());
    let mut at = 0;
    for pair in tokens.windows(2) {
        if matches!(pair[1].kind, TokenKind::Param(_)) && TYPED.iter().any(|word| pair[0].is_word(sql, word)) {
            text.push_str(&sql[at..pair[1].start as usize]);
            text.push_str("'1'");
            at = pair[1].end as usize;
        }
    }
    text.push_str(&sql[at..]);
    Some(text)
}
