//! `RESHARD … BALANCE`: what slots cost and have, asked of the hub and of every shard, before it is decided which of them move.

use std::collections::BTreeMap;
use std::time::Instant;

use weir_core::admin::PlanRequest;
use weir_core::error::UserError;
use weir_core::id::Slot;
use weir_core::reshard::balance::{Measured, balance};
use weir_core::reshard::load::SlotLoad;
use weir_core::reshard::survey::{Finding, Rows};
use weir_core::reshard::{Step, Weighed};

use super::{Asked, ask_all, hub_failed, hub_of};
use crate::app::App;
use crate::database::Database;

/// The steps, what the servers that take part have said, and what else there is to say. Errors: those of [`balance`].
pub(super) async fn drafted(
    app: &App,
    db: &Database,
    request: &PlanRequest,
    shards: &[Weighed],
) -> Result<(Vec<Step>, Vec<Asked>, Vec<Finding>), UserError> {
    let load = measured(db).await?;
    let topology = db.view_arc().topology.clone();
    let owning = topology.active().iter().map(|shard| {
        let name = &*shards[usize::from(shard.0)].name;
        (name, Some(topology.slots.owned_by(*shard)))
    });
    let mut asked = ask_all(app, db, request, owning.collect()).await?;
    let mut rows: BTreeMap<Slot, Rows> = BTreeMap::new();
    for one in &asked {
        for (slot, counted) in one.tables.iter().flat_map(|table| &table.rows) {
            // Guests are counted where they are, and are not its owner's.
            if shards.get(usize::from(topology.slots.owner(*slot).0)).is_some_and(|owner| owner.name == one.name) {
                *rows.entry(*slot).or_default() += *counted;
            }
        }
    }
    let balanced = balance(&Measured { shards, slots: &topology.slots, load: &load, rows: &rows })?;
    let findings = balanced.findings(shards, &topology.slots);
    let steps = balanced.steps;
    asked.retain(|one| steps.iter().any(|step| one.name == step.from || one.name == step.to));
    for one in asked.iter_mut().filter(|one| steps.iter().all(|step| step.from != one.name)) {
        one.tables.clear();
    }
    Ok((steps, asked, findings))
}

/// What all proxies have measured: this one until now, the others as they last told the hub.
async fn measured(db: &Database) -> Result<SlotLoad, UserError> {
    let others = hub_of(db)?.load_of_others(&db.name, crate::map::proxy_id()).await;
    let mut load = others.map_err(|error| hub_failed(&error))?;
    db.stats.load.rates(Instant::now()).used().for_each(|(slot, cost)| load.add(slot, cost));
    Ok(load)
}
