//! `RESHARD PLAN`: asks every server that would take part, and says what would move and what stands in the way.
//!
//! Invariant: nothing is changed; everything is read in short statements of weir's own account, each bounded in time. Rows of a
//! large table are counted in a part of its pages.
//! Non-goals: moving anything, and judging what servers say (`weir_core::reshard`).

mod ask;
pub mod cli;
mod roles;
pub mod schema;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use weir_core::admin::{PlanLine, PlanRequest, Table, plan_table};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::reshard::survey::{
    Finding, Gravity, Rows, ServerSaid, TableSaid, judge_pair, judge_server, judge_table,
};
use weir_core::reshard::{Goal, Step, Weighed, draft};

use crate::app::{App, control_login, primary_login};
use crate::config::Endpoint;
use crate::database::{Database, Shard};

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

/// The plan of one request. Errors: those of [`draft`]; 3D000 for a database that is not served; 0A000 for one without hub or
/// sharded tables; 08001 for a server that does not answer.
pub async fn plan(app: &App, request: &PlanRequest) -> Result<Table, UserError> {
    let db = app.database_meant(request.database.as_deref(), ("RESHARD PLAN", "RESHARD PLAN <database> …"))?;
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
    Ok(plan_table(&lines(&steps, &asked), &findings(request, &steps, &asked)))
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
