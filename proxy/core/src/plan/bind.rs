//! A template's inside, and what binding values and a topology to it does.

use std::borrow::Cow;
use std::sync::Arc;

use smallvec::SmallVec;

use super::carry::{CarriedKey, Carry};
use super::deal::{Deal, Dealt};
use super::formula::Blueprint;
use super::reason::{KeyName, NoCacheReason, RouteReason};
use super::refuse;
use super::scatter::ReadScatter;
use super::values::Values;
use super::{Access, DescribeTarget, Noting, Plan, Target, Wrap};
use crate::error::{Blame, UserError, sqlstate};
use crate::fresh::{Dependencies, Dependency, KeyHash, TableHash};
use crate::id::{ShardId, Slot};
use crate::merge::MergeSpec;
use crate::sql::facts::{KeySet, TableName, Term, family};
use crate::topology::moves::Guests;
use crate::topology::{Key, KeyType, Topology};

/// More keys of one table than this count as a keyless access of it: freshness words are few.
const DEPENDENCY_KEYS_MAX: usize = 16;

/// Everything of a template but its class.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Parameters the client wrote; higher numbers are lifted literals.
    pub client_params: u16,
    pub route: Route,
    pub access: Access,
    pub demands: Vec<Demand>,
    /// May the statement run on several shards, each answering for its own rows? `Err` says why not.
    pub scatter: Result<Scatter, Arc<str>>,
    /// May the rows of an INSERT be dealt out to several shards? `Err` says why not.
    pub deal: Result<Arc<Deal>, Cow<'static, str>>,
    pub reads: Vec<Need>,
    pub writes: Vec<Need>,
    pub cacheable: Result<(), NoCacheReason>,
    /// For how many milliseconds an answer may be served although it is overtaken.
    pub stale_ms: Option<u32>,
    pub wrap: Wrap,
    pub noting: Noting,
    /// Key parameters whose type is not certain in binary form.
    pub ambiguous: Vec<u16>,
    /// The fallback engine would give the right answer.
    pub engine: bool,
    /// Its rows may be read first and then written as values.
    pub carry: Option<Arc<Carry>>,
    /// The key of the table that an INSERT fills, if it has one.
    pub carried_key: Option<Arc<CarriedKey>>,
}

/// Where it goes, before keys are known.
#[derive(Clone, Debug)]
pub enum Route {
    Fixed { target: Target, reason: RouteReason },
    Refuse(Box<UserError>),
    Keyed(Keyed),
}

/// Routing by shard keys.
#[derive(Clone, Debug)]
pub struct Keyed {
    /// The table and key column a refusal speaks of.
    pub table: TableName,
    pub column: Box<str>,
    /// A global table in the statement: it can only run at home.
    pub home_table: Option<TableName>,
    /// Rows are inserted: every one needs a key.
    pub insert: bool,
    /// The key column is a varchar.
    pub varchar: bool,
    /// Every sharded table is restricted to keys.
    pub everywhere: bool,
    /// The demand that restricts the tables the result is spread by, if any.
    pub core: Option<usize>,
}

/// A set of keys that has to be computed from the values.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Demand {
    pub name: Arc<KeyName>,
    pub key_type: KeyType,
    pub keys: KeySet,
}

/// How the statement runs on several shards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scatter {
    /// Reads are merged; writes only run everywhere.
    pub read: Option<Box<ReadScatter>>,
}

/// A dependency, or one per key of a demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    Fixed(Dependency),
    Keyed { table: TableHash, demand: usize, write: bool },
}

/// A demand with its values.
struct Bound {
    hashes: SmallVec<[u64; 2]>,
    shards: SmallVec<[ShardId; 4]>,
    /// The values could not be read, and routing does not need them.
    unknown: bool,
}

type AllBound = SmallVec<[Bound; 1]>;

impl Bound {
    fn add(&mut self, hash: u64, topology: &Topology) {
        let shard = topology.slots.owner_of(hash);
        self.hashes.push(hash);
        if let Err(at) = self.shards.binary_search(&shard) {
            self.shards.insert(at, shard);
        }
    }
}

impl Shape {
    /// A template that goes to one place whatever its values.
    pub fn fixed(target: Target, access: Access, reason: RouteReason) -> Self {
        Shape {
            client_params: 0,
            route: Route::Fixed { target, reason },
            access,
            demands: Vec::new(),
            scatter: Err("it is not a query".into()),
            deal: Err("it is no INSERT".into()),
            reads: Vec::new(),
            writes: Vec::new(),
            cacheable: Err(NoCacheReason::NotSelect),
            stale_ms: None,
            wrap: Wrap::None,
            noting: Noting::None,
            ambiguous: Vec::new(),
            engine: false,
            carry: None,
            carried_key: None,
        }
    }

    pub fn refusing(error: UserError, access: Access) -> Self {
        let mut shape = Shape::fixed(Target::Home, access, RouteReason::Unparsed);
        shape.route = Route::Refuse(Box::new(error));
        shape
    }

    pub fn describe_target(&self) -> DescribeTarget {
        match &self.route {
            Route::Fixed { target: Target::Home | Target::One(_), .. } => DescribeTarget::Home,
            Route::Keyed(Keyed { home_table: Some(_), .. }) => DescribeTarget::Home,
            Route::Fixed { .. } | Route::Keyed(_) | Route::Refuse(_) => DescribeTarget::Any,
        }
    }

    pub fn check_types(&self, types: &[u32]) -> Result<(), UserError> {
        for demand in &self.demands {
            for term in &demand.keys.terms {
                let (number, array) = match term {
                    Term::Param { number, .. } => (*number, false),
                    Term::Array { number } => (*number, true),
                    Term::Literal(_) | Term::ArrayLiteral(_) | Term::Null => continue,
                };
                if number > self.client_params {
                    continue;
                }
                let declared = types.get(usize::from(number) - 1).copied().unwrap_or(0);
                let fits = match (declared, array) {
                    (0 | 705, _) => true,
                    (_, false) => family(declared) == Some(demand.key_type),
                    (_, true) => array_family(declared) == Some(demand.key_type),
                };
                if !fits {
                    return Err(refuse::parameter_type(number, demand.key_type.name()));
                }
            }
        }
        Ok(())
    }

    pub fn bind(&self, values: &Values<'_>, topology: &Topology) -> Result<Plan, UserError> {
        if let Route::Refuse(error) = &self.route {
            return Err((**error).clone());
        }
        let bound = self.bound(values, topology)?;
        let (target, reason) = match &self.route {
            Route::Fixed { target, reason } => (target.clone(), reason.clone()),
            Route::Keyed(keyed) => self.keyed_target(keyed, &bound, topology)?,
            Route::Refuse(error) => return Err((**error).clone()),
        };
        let merge = match (&target, &self.scatter) {
            (Target::Many(_) | Target::All, Ok(Scatter { read: Some(read) })) => {
                Some(Box::new(self.merge_spec(read, values)?))
            }
            _ => None,
        };
        let dealt = match (&target, &self.route, &self.deal) {
            (Target::Many(_), Route::Keyed(Keyed { insert: true, .. }), Ok(deal)) => {
                Some(dealt(deal, &bound, topology))
            }
            _ => None,
        };
        let guests = if dealt.is_some() { None } else { self.guests(&target, &reason, topology) };
        let cacheable = match self.cacheable {
            Ok(()) if merge.is_some() => Err(NoCacheReason::Scatter),
            Ok(()) if values.mention_time() => Err(NoCacheReason::TimeWord),
            verdict => verdict,
        };
        Ok(Plan {
            target,
            access: self.access,
            merge,
            dealt,
            guests,
            reads: depend(&self.reads, &bound),
            writes: depend(&self.writes, &bound),
            cacheable,
            stale_ms: self.stale_ms,
            wrap: self.wrap.clone(),
            noting: self.noting,
            reason,
        })
    }

    /// The guests that the statement could meet.
    fn guests(&self, target: &Target, reason: &RouteReason, topology: &Topology) -> Option<Arc<Guests>> {
        let several = match target {
            Target::All => true,
            Target::Many(shards) => shards.len() > 1,
            Target::Home | Target::One(_) | Target::Any | Target::Engine => false,
        };
        let looks = !matches!(self.wrap, Wrap::CopyIn(_) | Wrap::Carry(_)) && *reason != RouteReason::ReferenceWrite;
        topology.moves.all_guests().filter(|_| several && looks).cloned()
    }

    /// See [`super::Template::carried`].
    pub fn carried(&self, refusal: UserError) -> Result<Plan, UserError> {
        let Some(carry) = &self.carry else { return Err(refusal) };
        if refusal.sqlstate != sqlstate::FEATURE_NOT_SUPPORTED || refusal.blame != Blame::Client {
            return Err(refusal);
        }
        Ok(Plan {
            target: Target::All,
            access: Access::Write,
            merge: None,
            dealt: None,
            guests: None,
            reads: Dependencies::new(),
            writes: Dependencies::new(),
            cacheable: Err(NoCacheReason::NotSelect),
            stale_ms: None,
            wrap: Wrap::Carry(Arc::clone(carry)),
            noting: self.noting,
            reason: RouteReason::Carried { refusal: Box::new(refusal) },
        })
    }

    /// See [`super::Template::bind_rows`].
    pub fn bind_rows(&self, keys: &[Option<Key<'_>>], topology: &Topology) -> Result<Plan, UserError> {
        let plan = |target, reason, dealt, bound: &AllBound| Plan {
            target,
            access: self.access,
            merge: None,
            dealt,
            guests: None,
            reads: Dependencies::new(),
            writes: depend(&self.writes, bound),
            cacheable: Err(NoCacheReason::NotSelect),
            stale_ms: None,
            wrap: Wrap::None,
            noting: self.noting,
            reason,
        };
        let unknown = || Bound { hashes: SmallVec::new(), shards: SmallVec::new(), unknown: true };
        let mut bound: AllBound = self.demands.iter().map(|_| unknown()).collect();
        let keyed = match &self.route {
            Route::Refuse(error) => return Err((**error).clone()),
            Route::Fixed { target, reason } => return Ok(plan(target.clone(), reason.clone(), None, &bound)),
            Route::Keyed(keyed) => keyed,
        };
        let (table, column) = (&keyed.table, &keyed.column);
        let deal = self.deal.as_ref().map_err(|why| refuse::not_spread(why, table, column))?;
        let mut own = Bound { hashes: SmallVec::new(), shards: SmallVec::new(), unknown: false };
        for key in keys {
            let key = key.as_ref().ok_or_else(|| refuse::null_key(table, column))?;
            if keyed.varchar && key.ends_blank() {
                return Err(refuse::blank_key(table, column));
            }
            own.add(key.hash(), topology);
        }
        let (shards, hashes) = (own.shards.clone(), own.hashes.len());
        bound[deal.demand] = own;
        let dealt = dealt(deal, &bound, topology);
        let name = Arc::clone(&self.demands[deal.demand].name);
        let reason = RouteReason::KeysApart { name, keys: hashes, shards: shards.len() };
        Ok(plan(Target::Many(shards), reason, Some(dealt), &bound))
    }

    fn bound(&self, values: &Values<'_>, topology: &Topology) -> Result<AllBound, UserError> {
        let mut all = AllBound::new();
        for demand in &self.demands {
            let bound = match (self.bound_one(demand, values, topology), &self.route) {
                (Ok(bound), _) => bound,
                (Err(error), Route::Keyed(_)) => return Err(error),
                (Err(_), _) => Bound { hashes: SmallVec::new(), shards: SmallVec::new(), unknown: true },
            };
            all.push(bound);
        }
        Ok(all)
    }

    fn bound_one(&self, demand: &Demand, values: &Values<'_>, topology: &Topology) -> Result<Bound, UserError> {
        for &number in &self.ambiguous {
            let used = demand.keys.terms.iter().any(
                |term| matches!(term, Term::Param { number: other, .. } | Term::Array { number: other } if *other == number),
            );
            if used && matches!(values.params.get(usize::from(number) - 1), Some(super::Datum::Binary(_))) {
                return Err(refuse::ambiguous(number));
            }
        }
        let keys = values.keys(&demand.keys, demand.key_type, self.client_params)?;
        if let Route::Keyed(Keyed { insert: true, table, column, .. }) = &self.route
            && keys.len() < demand.keys.terms.len()
        {
            return Err(refuse::null_key(table, column));
        }
        if let Route::Keyed(Keyed { insert: true, varchar: true, table, column, .. }) = &self.route
            && keys.iter().any(Key::ends_blank)
        {
            return Err(refuse::blank_key(table, column));
        }
        let mut bound = Bound { hashes: SmallVec::new(), shards: SmallVec::new(), unknown: false };
        for key in &keys {
            bound.add(key.hash(), topology);
        }
        Ok(bound)
    }

    fn keyed_target(
        &self,
        keyed: &Keyed,
        bound: &AllBound,
        topology: &Topology,
    ) -> Result<(Target, RouteReason), UserError> {
        if keyed.everywhere {
            let mut shards: SmallVec<[ShardId; 4]> =
                bound.iter().flat_map(|bound| bound.shards.iter().copied()).collect();
            shards.sort_unstable();
            shards.dedup();
            if shards.len() <= 1 {
                let shard = shards.first().copied().unwrap_or(topology.home);
                return self.one(keyed, bound, shard, topology);
            }
            if keyed.insert && self.scatter.is_ok() {
                let (name, count) = (Arc::clone(&self.demands[0].name), shards.len());
                let reason = RouteReason::KeysApart { name, keys: bound[0].hashes.len(), shards: count };
                return Ok((Target::Many(shards), reason));
            }
            if keyed.insert {
                let deal = self.deal.as_ref();
                let deal = deal.map_err(|why| refuse::insert_apart(shards.len(), why, &keyed.table, &keyed.column))?;
                let (keys, count) = (&bound[deal.demand], shards.len());
                let name = Arc::clone(&self.demands[deal.demand].name);
                let reason = RouteReason::KeysApart { name, keys: keys.hashes.len(), shards: count };
                return Ok((Target::Many(shards), reason));
            }
            if let Err(why) = &self.scatter {
                return Err(refuse::keys_apart(shards.len(), why, &keyed.table, &keyed.column));
            }
        }
        if let Err(why) = &self.scatter {
            return Err(refuse::not_spread(why, &keyed.table, &keyed.column));
        }
        let Some(core) = keyed.core else { return Ok((Target::All, RouteReason::Scatter)) };
        let shards = &bound[core].shards;
        if shards.len() <= 1 {
            return self.one(keyed, bound, shards.first().copied().unwrap_or(topology.home), topology);
        }
        let name = Arc::clone(&self.demands[core].name);
        let reason = RouteReason::KeysApart { name, keys: bound[core].hashes.len(), shards: shards.len() };
        Ok((Target::Many(shards.clone()), reason))
    }

    fn one(
        &self,
        keyed: &Keyed,
        bound: &AllBound,
        shard: ShardId,
        topology: &Topology,
    ) -> Result<(Target, RouteReason), UserError> {
        let told = bound.iter().position(|bound| !bound.hashes.is_empty());
        let shard = match (&keyed.home_table, told) {
            // Rows of no key are on every shard.
            (Some(_), None) => topology.home,
            (Some(table), Some(_)) if shard != topology.home => return Err(refuse::mixed_home(table, &keyed.table)),
            _ => shard,
        };
        let reason = match told {
            None => RouteReason::NoKey { name: Arc::clone(&self.demands[keyed.core.unwrap_or(0)].name) },
            Some(index) => {
                let name = Arc::clone(&self.demands[index].name);
                match bound[index].hashes.as_slice() {
                    [hash] => RouteReason::Key { name, slot: Slot::of_hash(*hash), shard },
                    hashes => RouteReason::KeysTogether { name, keys: hashes.len(), shard },
                }
            }
        };
        Ok((Target::One(shard), reason))
    }

    fn merge_spec(&self, read: &ReadScatter, values: &Values<'_>) -> Result<MergeSpec, UserError> {
        let count = |term: &Option<Term>| match term {
            Some(term) => values.count(term, self.client_params),
            None => Ok(None),
        };
        let limit = count(&read.limit)?;
        if read.ties && limit.is_none() {
            return Err(refuse::ties_without_count());
        }
        let mut group = read.group.clone();
        if let Some(group) = &mut group {
            let bound =
                |blueprint: &Blueprint| blueprint.bind(values, self.client_params).ok_or_else(refuse::number_missing);
            for (column, blueprint) in &read.computed {
                group.computed.push((*column, bound(blueprint)?));
            }
            group.having = read.having.as_ref().map(bound).transpose()?;
        }
        Ok(MergeSpec {
            hidden: read.hidden,
            group,
            distinct: read.distinct,
            distinct_on: read.distinct_on.clone(),
            order: read.order.clone(),
            offset: count(&read.offset)?.unwrap_or(0),
            limit,
            ties: read.ties,
        })
    }
}

/// Each row with its owner: keys are bound in the order of rows, one for each.
fn dealt(deal: &Arc<Deal>, bound: &AllBound, topology: &Topology) -> Arc<Dealt> {
    let hashes = &bound[deal.demand].hashes;
    let owners = hashes.iter().map(|hash| topology.slots.owner_of(*hash)).collect();
    Arc::new(Dealt { deal: Arc::clone(deal), owners, hashes: hashes.as_slice().into() })
}

fn depend(needs: &[Need], bound: &AllBound) -> Dependencies {
    let mut dependencies = Dependencies::new();
    let mut add = |dependency| {
        if !dependencies.contains(&dependency) {
            dependencies.push(dependency);
        }
    };
    for need in needs {
        match *need {
            Need::Fixed(dependency) => add(dependency),
            Need::Keyed { table, demand, write } => {
                let hashes = &bound[demand].hashes;
                let many = bound[demand].unknown || hashes.len() > DEPENDENCY_KEYS_MAX;
                match (write, many) {
                    (false, true) => add(Dependency::Table(table)),
                    (false, false) => add(Dependency::Keyless(table)),
                    (true, many) => {
                        add(Dependency::Table(table));
                        if many {
                            add(Dependency::Keyless(table));
                        }
                    }
                }
                if !many {
                    for &hash in hashes {
                        add(Dependency::Key(table, KeyHash(hash)));
                    }
                }
            }
        }
    }
    dependencies
}

/// Key family of an array type.
fn array_family(type_oid: u32) -> Option<KeyType> {
    match type_oid {
        1016 | 1005 | 1007 => Some(KeyType::Int),
        1009 | 1015 => Some(KeyType::Text),
        2951 => Some(KeyType::Uuid),
        _ => None,
    }
}
