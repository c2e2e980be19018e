//! `RESHARD`: asks every server that would take part what would move and what stands in the way, and puts moves and orders down in the hub.
//!
//! Invariant: a plan changes nothing; everything is read in short statements of weir's own account, each bounded in time. Rows of a
//! large table are counted in a part of its pages. What begins is what the plan of that moment says, if nothing stands in its way.
//! Non-goals: moving anything ([`crate::mover`]), and judging what servers say (`weir_core::reshard`).

mod ask;
mod balance;
pub mod cli;
pub mod late;
mod roles;
pub mod schema;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use weir_core::admin::{MovesRow, PlanLine, PlanRequest, Reshard, Table, Which, moves_table, plan_table};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::reshard::phase::{self, Aim, Made, Order, Phase};
use weir_core::reshard::survey::{
    Finding, Gravity, Rows, ServerSaid, TableSaid, judge_lone, judge_pair, judge_server, judge_table,
};
use weir_core::reshard::throttle::{Held, Limit};
use weir_core::reshard::{Goal, Step, Today, Weighed, draft};
use weir_core::topology::{KeySet, Width};

use crate::app::{App, control_login, primary_login};
use crate::config::{Endpoint, ShardConfig};
use crate::database::{Database, Shard};
use crate::hub::moves::{MoveRow, NewMove};
use crate::hub::{Hub, HubError};

/// Longest list of slots in a plan, in bytes.
const LIST_BYTES_MAX: usize = 60;
/// Longest time for all questions of one plan.
const PATIENCE: Duration = Duration::from_secs(120);

/// The tables `c`, of schema `n`, that the rows of `wanted` ones ($1, $2, $3: [`weir_core::topology::spread::names`]) are in: themselves, or their partitions.
pub const LEAVES: &str = "
FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted(schema, name, key)
JOIN pg_namespace s ON s.nspname = wanted.schema
JOIN pg_class w ON w.relnamespace = s.oid AND w.relname = wanted.name
CROSS JOIN LATERAL (SELECT w.oid WHERE w.relkind <> 'p'
                    UNION ALL SELECT t.relid FROM pg_partition_tree(w.oid) t WHERE w.relkind = 'p' AND t.isleaf) AS leaf(oid)
JOIN pg_class c ON c.oid = leaf.oid JOIN pg_namespace n ON n.oid = c.relnamespace";

/// A server that takes part.
struct Asked {
    name: Box<str>,
    said: ServerSaid,
    /// Of sources.
    tables: Vec<TableSaid>,
    /// Bytes per second that a sample of its rows was read with.
    rate: Option<f64>,
}

/// What a request comes to.
struct Drafted {
    db: Arc<Database>,
    steps: Vec<Step>,
    asked: Vec<Asked>,
    findings: Vec<Finding>,
}

/// Carries a command out. Errors: those of [`draft`] and [`phase::order`]; 3D000 for a database that is not served; 0A000 for one without
/// hub or sharded tables; 08001 for a server that does not answer; 55000 for what stands in the way.
pub async fn run(app: &App, command: &Reshard) -> Result<Table, UserError> {
    match command {
        Reshard::Plan(request) => {
            let Drafted { steps, asked, findings, .. } = drafted(app, request).await?;
            Ok(plan_table(&lines(request, &steps, &asked), &findings))
        }
        Reshard::Start(request) => start(app, request).await,
        Reshard::Order { order, which } => order_moves(app, *order, which).await,
        Reshard::Throttle { limits, which } => throttle(app, limits, which).await,
    }
}

async fn drafted(app: &App, request: &PlanRequest) -> Result<Drafted, UserError> {
    let db = app.database_meant(request.database.as_deref(), ("RESHARD", "RESHARD PLAN <database> …"))?;
    let view = db.view_arc();
    if !view.rules.any_sharded() || view.topology.is_single() && request.goal.adds().is_none() {
        return Err(UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "there is nothing to reshard")
            .detail(format!("Database {} has one shard, or no sharded tables.", db.name))
            .hint("Declare sharded tables in the config file (weir advise proposes some), with [hub] and shards."));
    }
    // What does not take part has no share, until it does.
    let share = |(id, shard): (ShardId, &Arc<Shard>)| {
        let weight = if view.topology.roster.is_active(id) { db.weight(id) } else { 0 };
        Weighed { name: shard.name.clone(), weight }
    };
    let shards: Vec<Weighed> = db.shards.by_shard().map(share).collect();
    let drafted = timeout(PATIENCE, async {
        if request.goal == Goal::Balance {
            return balance::drafted(app, &db, request, &shards).await;
        }
        let steps = draft(&request.goal, Today { shards: &shards, slots: &view.topology.slots, rules: &view.rules })?;
        let servers = steps.iter().flat_map(|step| [&step.from, &step.to]).map(|name| (&**name, given(&steps, name)));
        let asked = ask_all(app, &db, request, servers.collect()).await?;
        Ok((steps, asked, Vec::new()))
    });
    let (steps, asked, said) = drafted.await.map_err(|_| {
        UserError::new(Blame::Proxy, sqlstate::QUERY_CANCELED, "the servers took too long to say what there is")
            .detail(format!("Counting rows and asking for settings took more than {} s.", PATIENCE.as_secs()))
    })??;
    let findings = findings(&db, request, (&steps, &asked), said);
    Ok(Drafted { db, steps, asked, findings })
}

async fn start(app: &App, request: &PlanRequest) -> Result<Table, UserError> {
    let Drafted { db, steps, findings, .. } = drafted(app, request).await?;
    let blockers: Vec<String> = findings
        .iter()
        .filter(|finding| finding.gravity == Gravity::Blocker)
        .map(|finding| format!("{} {}: {}. {}", finding.shard, finding.table, finding.what, finding.remedy))
        .collect();
    if !blockers.is_empty() {
        return Err(UserError::new(Blame::Client, "55000", "something stands in the way of this move")
            .detail(blockers.join("\n"))
            .hint("RESHARD PLAN lists it all. Nothing was changed."));
    }
    let hub = hub_of(&db)?;
    if let Some((name, address, weight)) = request.goal.adds().filter(|(name, ..)| is_new(&db, name)) {
        let shard = ShardConfig { name: name.to_owned(), primary: endpoint(address)?, replicas: Vec::new(), weight };
        hub.add_shard(&db.name, &shard).await.map_err(|error| hub_failed(&error))?;
    }
    let new = steps.into_iter().map(|step| NewMove {
        from: step.from.to_string(),
        to: step.to.to_string(),
        keys: step.keys,
        key: request.goal.key().map(|key| key.text.clone()),
        aim: Aim::Ready,
    });
    let made = hub
        .add_moves(&db.name, &new.collect::<Vec<_>>(), &weights(&request.goal))
        .await
        .map_err(|error| hub_failed(&error))?;
    if made.is_none() {
        return Err(UserError::new(Blame::Client, "55006", "slots of this database are on their way already")
            .hint("SHOW MOVES lists them. RESHARD COMPLETE or RESHARD CANCEL ends them."));
    }
    moves_now(&db, hub, "RESHARD START").await
}

/// The weights that a goal gives. Who goes has none, which counts where it cannot be retired, as the home shard.
fn weights(goal: &Goal) -> Vec<(String, u32)> {
    match goal {
        Goal::Add { shard, weight, .. } => vec![(shard.clone(), *weight)],
        Goal::Remove { shard } => vec![(shard.clone(), 0)],
        Goal::Weigh(weights) => weights.clone(),
        Goal::Move { .. } | Goal::Balance | Goal::Isolate { .. } | Goal::Release { .. } => Vec::new(),
    }
}

async fn order_moves(app: &App, order: Order, which: &Which) -> Result<Table, UserError> {
    let db = app.database_meant(which.database.as_deref(), ("RESHARD", "RESHARD CUTOVER <database>"))?;
    let hub = hub_of(&db)?;
    let moves = hub.moves(&db.name, which.id.is_some()).await.map_err(|error| hub_failed(&error))?;
    let meant = meant(&moves, which)?;
    // All or none: what may not be said to one of them is said to nobody.
    let made: Vec<(&MoveRow, Made)> =
        meant.into_iter().map(|one| Ok((one, phase::order(one.phase, order)?))).collect::<Result<_, UserError>>()?;
    for (one, made) in made {
        let (aim, paused, next) = match made {
            Made::Aim(aim) => (aim, false, one.phase),
            Made::Paused(paused) => (one.aim, paused, one.phase),
            Made::Phase(next) => (one.aim, one.paused, next),
        };
        let set = hub.order_move(one.id, one.phase, aim, paused, next).await.map_err(|error| hub_failed(&error))?;
        if !set {
            return Err(UserError::new(Blame::Client, "55000", format!("move {} has just gone on", one.id))
                .hint("SHOW MOVES tells how far it is; say it again."));
        }
    }
    moves_now(&db, hub, "RESHARD").await
}

fn meant<'m>(moves: &'m [MoveRow], which: &Which) -> Result<Vec<&'m MoveRow>, UserError> {
    let meant: Vec<&MoveRow> = moves.iter().filter(|one| which.id.is_none_or(|id| id == one.id)).collect();
    if meant.is_empty() {
        return Err(
            UserError::new(Blame::Client, "42704", "there is no such move").hint("SHOW MOVES lists what there is.")
        );
    }
    Ok(meant)
}

/// Whoever drives the moves reads it within a second.
async fn throttle(app: &App, limits: &[Limit], which: &Which) -> Result<Table, UserError> {
    let db = app.database_meant(which.database.as_deref(), ("RESHARD", "RESHARD THROTTLE <database> …"))?;
    let hub = hub_of(&db)?;
    let moves = hub.moves(&db.name, false).await.map_err(|error| hub_failed(&error))?;
    for one in meant(&moves, which)? {
        let mut all = one.limits;
        for limit in limits {
            all.set(*limit);
        }
        hub.limit_move(one.id, &all).await.map_err(|error| hub_failed(&error))?;
    }
    moves_now(&db, hub, "RESHARD").await
}

/// What was said is in the hub: it is done from now on, and this is how it stands.
async fn moves_now(db: &Database, hub: &Hub, tag: &'static str) -> Result<Table, UserError> {
    db.moves.ordered.notify_one();
    let moves = hub.moves(&db.name, false).await.map_err(|error| hub_failed(&error))?;
    Ok(moves_table(&moves.iter().map(|one| moves_row(db, one)).collect::<Vec<_>>(), tag))
}

/// A move as the console shows it.
pub fn moves_row(db: &Database, row: &MoveRow) -> MovesRow {
    let done = row.progress;
    let view = db.view();
    let isolated = view.topology.slots.isolated().iter();
    let names: Vec<&str> =
        isolated.filter(|key| row.keys.beside().any(|hash| hash == key.hash)).map(|key| &*key.name).collect();
    let is_copying = row.phase == Phase::Copy;
    let rate = (is_copying && row.since >= 1.0).then(|| (done.rows_done as f64 / row.since) as i64);
    MovesRow {
        database: db.name.to_string(),
        id: row.id,
        from: row.from.clone(),
        to: row.to.clone(),
        slots: row.keys.slots().len(),
        key: (!names.is_empty()).then(|| names.join(", ")),
        phase: row.phase.as_str(),
        aim: row.aim.as_str(),
        is_paused: row.paused,
        since_s: row.since as i64,
        rows: done.rows_done,
        rows_total: done.rows_total,
        bytes: done.bytes_done,
        rate,
        eta_s: rate.filter(|rate| *rate > 0).map(|rate| (done.rows_total - done.rows_done).max(0) / rate),
        changes: done.changes,
        lag_bytes: done.lag_bytes,
        pause_us: done.paused_us,
        throttled_by: done.held.map(Held::as_str),
        limits: row.limits.to_string(),
        notice: row.notice.clone(),
        error: row.error.clone(),
    }
}

fn hub_of(db: &Database) -> Result<&Hub, UserError> {
    db.hub.as_ref().ok_or_else(|| {
        UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this database has no hub")
            .hint("Name one in [hub] of the config file.")
    })
}

fn hub_failed(error: &HubError) -> UserError {
    UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT, "the hub does not do it")
        .detail(error.to_string())
        .hint("Nothing moves without the hub. What is under way goes on when it is back.")
}

/// What a shard gives away, if anything.
fn given(steps: &[Step], shard: &str) -> Option<KeySet> {
    let given = steps.iter().filter(|step| *step.from == *shard).map(|step| &step.keys);
    given.fold(None, |all, keys| Some(all.map_or_else(|| keys.clone(), |all: KeySet| all.with(keys))))
}

/// Every server, each once; of one that these keys may be taken from also its tables.
async fn ask_all(
    app: &App,
    db: &Database,
    request: &PlanRequest,
    servers: Vec<(&str, Option<KeySet>)>,
) -> Result<Vec<Asked>, UserError> {
    let config = app.config();
    let rules = Arc::clone(&db.view().rules);
    let mut asked: Vec<Asked> = Vec::new();
    for (name, given) in servers {
        if asked.iter().any(|known| *known.name == *name) {
            continue;
        }
        let login = match (request.goal.adds(), db.shards.iter().find(|shard| *shard.name == *name)) {
            (_, Some(shard)) => primary_login(&config, &db.config, &shard.roles),
            (Some((_, address, _)), None) => control_login(&config, &db.config, &endpoint(address)?),
            _ => continue,
        };
        let answers = ask::server(&login, &rules, given.as_ref()).await.map_err(|error| {
            UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT, format!("shard {name} cannot be asked"))
                .detail(format!("{}: {error:#}", login.route.endpoint()))
                .hint("weir logs in there as [server_auth] says, to the database of the same name.")
        })?;
        asked.push(Asked { name: name.into(), said: answers.said, tables: answers.tables, rate: answers.rate });
    }
    Ok(asked)
}

fn endpoint(address: &str) -> Result<Endpoint, UserError> {
    Endpoint::parse(address).ok_or_else(|| {
        let message = format!("\"{address}\" is not host:port of a server");
        UserError::new(Blame::Client, sqlstate::INVALID_PARAMETER_VALUE, message)
            .hint("RESHARD PLAN ADD SHARD shard2 'db3.example.com:5432'")
    })
}

fn of<'a>(asked: &'a [Asked], name: &str) -> Option<&'a Asked> {
    asked.iter().find(|one| *one.name == *name)
}

/// Each step with its tables, the whole step first.
fn lines(request: &PlanRequest, steps: &[Step], asked: &[Asked]) -> Vec<PlanLine> {
    let mut lines = Vec::new();
    for step in steps {
        let Some(source) = of(asked, &step.from) else { continue };
        let seconds = |bytes: f64| source.rate.map(|rate| bytes / rate);
        let line = |table: Option<String>, rows: Rows, note: String| PlanLine {
            from: step.from.to_string(),
            to: step.to.to_string(),
            table,
            slots: step.keys.slots().len(),
            rows: rows.rows.round() as u64,
            bytes: rows.bytes.round() as u64,
            seconds: seconds(rows.bytes),
            note,
        };
        let mut sum = Rows::default();
        let mut of_tables = Vec::new();
        for table in &source.tables {
            let rows = table.within(&step.keys);
            sum += rows;
            let note = if table.is_sampled { "estimated from a part of its pages" } else { "counted" };
            of_tables.push(line(Some(table.name.clone()), rows, note.to_owned()));
        }
        lines.push(line(None, sum, what_moves(request, step)));
        lines.append(&mut of_tables);
    }
    lines
}

/// In words, for people.
fn what_moves(request: &PlanRequest, step: &Step) -> String {
    match request.goal.key() {
        Some(key) => format!("key {}", key.text),
        None => format!("slots {}", abridged(&step.keys.to_string())),
    }
}

/// The beginning of a list whose parts are told apart by ", ", so that a table of plans fits a screen.
fn abridged(list: &str) -> String {
    let Some(end) = list.get(..LIST_BYTES_MAX).and_then(|start| start.rfind(", ")) else { return list.to_owned() };
    format!("{}, … and {} more ranges", &list[..end], list[end..].matches(", ").count())
}

/// Does this shard not take part yet?
fn is_new(db: &Database, name: &str) -> bool {
    let view = db.view();
    !db.shards.by_shard().any(|(id, shard)| *shard.name == *name && view.topology.roster.is_active(id))
}

/// Blockers first. `found`: what the draft itself has to say.
fn findings(
    db: &Database,
    request: &PlanRequest,
    (steps, asked): (&[Step], &[Asked]),
    mut found: Vec<Finding>,
) -> Vec<Finding> {
    for one in asked {
        found.extend(judge_server(&one.name, &one.said));
        found.extend(one.tables.iter().flat_map(|table| judge_table(&one.name, table)));
    }
    if db.view().width != Width::Several {
        let sources = asked.iter().filter(|one| steps.iter().any(|step| *step.from == *one.name));
        found.extend(sources.flat_map(|one| judge_lone(&one.name, &one.said)));
    }
    for step in steps {
        if let (Some(source), Some(target)) = (of(asked, &step.from), of(asked, &step.to)) {
            let is_new = request.goal.adds().is_some_and(|(shard, ..)| *shard == *step.to && is_new(db, shard));
            found.extend(judge_pair((&source.name, &source.said), (&target.name, &target.said), is_new));
        }
    }
    found.dedup();
    found.sort_by_key(|finding| finding.gravity);
    found
}

#[cfg(test)]
mod tests {
    use super::abridged;

    #[test]
    fn a_long_list_shows_its_beginning_and_how_much_is_left() {
        assert_eq!(abridged("0-2047"), "0-2047");
        let list: Vec<String> = (0..100).map(|slot| (slot * 2).to_string()).collect();
        let shown = abridged(&list.join(", "));
        assert!(shown.starts_with("0, 2, 4, ") && shown.ends_with(", … and 84 more ranges"), "{shown}");
    }
}
