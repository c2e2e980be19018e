//! `RESHARD`: asks every server that would take part what would move and what stands in the way, and puts moves and orders down in the hub.
//!
//! Invariant: a plan changes nothing; everything is read in short statements of weir's own account, each bounded in time. Rows of a
//! large table are counted in a part of its pages. What begins is what the plan of that moment says, if nothing stands in its way.
//! Non-goals: moving anything ([`crate::mover`]), and judging what servers say (`weir_core::reshard`).

mod ask;
pub mod cli;
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
    Finding, Gravity, Rows, ServerSaid, TableSaid, judge_pair, judge_server, judge_table, judge_unique,
};
use weir_core::reshard::{Goal, Step, Weighed, draft};

use crate::app::{App, control_login, primary_login};
use crate::config::{Endpoint, ShardConfig};
use crate::database::{Database, Shard};
use crate::hub::moves::{MoveRow, NewMove};
use crate::hub::{Hub, HubError};

/// Longest time for all questions of one plan.
const PATIENCE: Duration = Duration::from_secs(120);

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
            Ok(plan_table(&lines(&steps, &asked), &findings))
        }
        Reshard::Start(request) => start(app, request).await,
        Reshard::Order { order, which } => order_moves(app, *order, which).await,
    }
}

async fn drafted(app: &App, request: &PlanRequest) -> Result<Drafted, UserError> {
    let db = app.database_meant(request.database.as_deref(), ("RESHARD", "RESHARD PLAN <database> …"))?;
    let view = db.view_arc();
    if !view.rules.any_sharded() || view.topology.is_single() && !matches!(request.goal, Goal::Add { .. }) {
        return Err(UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "there is nothing to reshard")
            .detail(format!("Database {} has one shard, or no sharded tables.", db.name))
            .hint("Declare sharded tables in the config file (weir advise proposes some), with [hub] and shards."));
    }
    // What does not take part has no share, until it does.
    let share = |(id, shard): (ShardId, &Arc<Shard>)| {
        let weight = if view.topology.roster.is_active(id) { shard.weight } else { 0 };
        Weighed { name: shard.name.clone(), weight }
    };
    let shards: Vec<Weighed> = db.shards.by_shard().map(share).collect();
    let steps = draft(&request.goal, &shards, &view.topology.slots)?;
    let asked = timeout(PATIENCE, ask_all(app, &db, request, &steps)).await;
    let asked = asked.map_err(|_| {
        UserError::new(Blame::Proxy, sqlstate::QUERY_CANCELED, "the servers took too long to say what there is")
            .detail(format!("Counting rows and asking for settings took more than {} s.", PATIENCE.as_secs()))
    })??;
    let mut findings = findings(request, &steps, &asked);
    if view.rules.any_unique() {
        findings.insert(0, judge_unique());
    }
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
    if let Goal::Add { shard, address, weight } = &request.goal {
        let shard =
            ShardConfig { name: shard.clone(), primary: endpoint(address)?, replicas: Vec::new(), weight: *weight };
        hub.add_shard(&db.name, &shard).await.map_err(|error| hub_failed(&error))?;
    }
    let new = steps.into_iter().map(|step| NewMove {
        from: step.from.to_string(),
        to: step.to.to_string(),
        slots: step.slots,
        aim: Aim::Ready,
    });
    let made = hub.add_moves(&db.name, &new.collect::<Vec<_>>()).await.map_err(|error| hub_failed(&error))?;
    if made.is_none() {
        return Err(UserError::new(Blame::Client, "55006", "slots of this database are on their way already")
            .hint("SHOW MOVES lists them. RESHARD COMPLETE or RESHARD CANCEL ends them."));
    }
    moves_now(&db, hub, "RESHARD START").await
}

async fn order_moves(app: &App, order: Order, which: &Which) -> Result<Table, UserError> {
    let db = app.database_meant(which.database.as_deref(), ("RESHARD", "RESHARD CUTOVER <database>"))?;
    let hub = hub_of(&db)?;
    let moves = hub.moves(&db.name, which.id.is_some()).await.map_err(|error| hub_failed(&error))?;
    let meant: Vec<&MoveRow> = moves.iter().filter(|one| which.id.is_none_or(|id| id == one.id)).collect();
    if meant.is_empty() {
        return Err(
            UserError::new(Blame::Client, "42704", "there is no such move").hint("SHOW MOVES lists what there is.")
        );
    }
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

async fn moves_now(db: &Database, hub: &Hub, tag: &'static str) -> Result<Table, UserError> {
    let moves = hub.moves(&db.name, false).await.map_err(|error| hub_failed(&error))?;
    Ok(moves_table(&moves.iter().map(|one| moves_row(db, one)).collect::<Vec<_>>(), tag))
}

/// A move as the console shows it.
pub fn moves_row(db: &Database, row: &MoveRow) -> MovesRow {
    let done = row.progress;
    let is_copying = row.phase == Phase::Copy;
    let rate = (is_copying && row.since >= 1.0).then(|| (done.rows_done as f64 / row.since) as i64);
    MovesRow {
        database: db.name.to_string(),
        id: row.id,
        from: row.from.clone(),
        to: row.to.clone(),
        slots: row.slots.len(),
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

/// Every server of a step, each once.
async fn ask_all(app: &App, db: &Database, request: &PlanRequest, steps: &[Step]) -> Result<Vec<Asked>, UserError> {
    let config = app.config();
    let rules = Arc::clone(&db.view().rules);
    let mut asked: Vec<Asked> = Vec::new();
    for name in steps.iter().flat_map(|step| [&step.from, &step.to]) {
        if asked.iter().any(|known| known.name == *name) {
            continue;
        }
        let login = match (&request.goal, db.shards.iter().find(|shard| *shard.name == **name)) {
            (_, Some(shard)) => primary_login(&config, &db.config, &shard.roles),
            (Goal::Add { address, .. }, None) => control_login(&config, &db.config, &endpoint(address)?),
            _ => continue,
        };
        let is_source = steps.iter().any(|step| step.from == *name);
        let answers = ask::server(&login, &rules, is_source).await.map_err(|error| {
            UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT, format!("shard {name} cannot be asked"))
                .detail(format!("{}: {error:#}", login.route.endpoint()))
                .hint("weir logs in there as [server_auth] says, to the database of the same name.")
        })?;
        asked.push(Asked { name: name.clone(), said: answers.said, tables: answers.tables, rate: answers.rate });
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
fn lines(steps: &[Step], asked: &[Asked]) -> Vec<PlanLine> {
    let mut lines = Vec::new();
    for step in steps {
        let Some(source) = of(asked, &step.from) else { continue };
        let seconds = |bytes: f64| source.rate.map(|rate| bytes / rate);
        let line = |table: Option<String>, rows: Rows, note: String| PlanLine {
            from: step.from.to_string(),
            to: step.to.to_string(),
            table,
            slots: step.slots.len(),
            rows: rows.rows.round() as u64,
            bytes: rows.bytes.round() as u64,
            seconds: seconds(rows.bytes),
            note,
        };
        let mut sum = Rows::default();
        let mut of_tables = Vec::new();
        for table in &source.tables {
            let rows = table.within(&step.slots);
            sum += rows;
            let note = if table.is_sampled { "estimated from a part of its pages" } else { "counted" };
            of_tables.push(line(Some(table.name.clone()), rows, note.to_owned()));
        }
        lines.push(line(None, sum, format!("slots {}", step.slots)));
        lines.append(&mut of_tables);
    }
    lines
}

/// Blockers first.
fn findings(request: &PlanRequest, steps: &[Step], asked: &[Asked]) -> Vec<Finding> {
    let mut found: Vec<Finding> = Vec::new();
    for one in asked {
        found.extend(judge_server(&one.name, &one.said));
        found.extend(one.tables.iter().flat_map(|table| judge_table(&one.name, table)));
    }
    for step in steps {
        if let (Some(source), Some(target)) = (of(asked, &step.from), of(asked, &step.to)) {
            let is_new = matches!(&request.goal, Goal::Add { shard, .. } if *shard == *step.to);
            found.extend(judge_pair((&source.name, &source.said), (&target.name, &target.said), is_new));
        }
    }
    found.dedup();
    found.sort_by_key(|finding| finding.gravity == Gravity::Warning);
    found
}
