//! Which slots ought to move so that every shard has its weight's share of the measured time, with as few rows as possible.
//!
//! Invariant: no shard that had more than its share gets more, and none that had enough is brought below: after the moves the busiest
//! shard is never busier than before. Nothing moves while all are within [`OUT`] of their share. A slot that costs more than a shard's
//! whole share is named and stays where it is: moving it moves the trouble. It is left out of account, as if its key were isolated already;
//! so are keys that are.
//! Non-goals: measuring ([`super::load`]), and cutting a slot ([`super::Goal`] isolates a key).

use std::collections::BTreeMap;

use super::load::SlotLoad;
use super::survey::{Finding, Gravity, Rows};
use super::{Step, Weighed, gathered, refused};
use crate::error::{UserError, sqlstate};
use crate::id::Slot;
use crate::topology::SlotMap;

/// A shard whose time is further than this from its share is to be helped.
pub const OUT: f64 = 0.10;
/// How near to their share shards are brought then.
const AIM: f64 = 0.05;

/// What is known of a database whose load is to be spread.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// In the order of `slots`.
    pub shards: &'a [Weighed],
    pub slots: &'a SlotMap,
    /// Rates, of all proxies together.
    pub load: &'a SlotLoad,
    /// What moving a slot moves; one that is missing has none.
    pub rows: &'a BTreeMap<Slot, Rows>,
}

/// What one shard has of the time, in shares of all.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Share {
    pub wanted: f64,
    pub now: f64,
    /// After the moves.
    pub then: f64,
}

/// A draft, and what it comes to.
#[derive(Clone, PartialEq, Debug)]
pub struct Balanced {
    pub steps: Vec<Step>,
    /// In the order of the shards.
    pub shares: Vec<Share>,
    /// Slots that cost more than a shard's whole share of the time, and how much of it.
    pub hot: Vec<(Slot, f64)>,
}

/// The fewest rows that bring each shard near to its share. Errors: 55000 while nothing has been measured; 22023 where nothing is out of
/// balance, or nothing could mend it.
pub fn balance(measured: &Measured<'_>) -> Result<Balanced, UserError> {
    let total = measured.load.total().time_us;
    if total <= 0.0 {
        return Err(refused("55000", "no load has been measured yet".to_owned())
            .detail("Statements that one key sends to one shard are measured, for as long as weir runs.")
            .hint("SHOW SLOT LOAD shows what this weir has measured. Try again when it has been busy for a minute."));
    }
    let mut scale = Scale::new(measured);
    let moved = scale.levelled(measured);
    let balanced = Balanced {
        steps: gathered(moved.iter().map(|one| (one.from, one.to, one.slot)), measured.shards, measured.slots),
        shares: scale.shares(measured, total),
        hot: scale.hot.iter().map(|slot| (*slot, measured.load.of(*slot).time_us / total)).collect(),
    };
    if balanced.steps.is_empty() {
        return Err(nothing_to_move(measured, &balanced));
    }
    Ok(balanced)
}

impl Balanced {
    /// What a plan says of it, beside the steps.
    pub fn findings(&self, shards: &[Weighed], slots: &SlotMap) -> Vec<Finding> {
        let name = |number: usize| shards.get(number).map_or_else(String::new, |shard| shard.name.to_string());
        let finding = |gravity, shard, what, remedy: &str| Finding {
            gravity,
            shard,
            table: String::new(),
            what,
            remedy: remedy.to_owned(),
        };
        let hot = self.hot.iter().map(|(slot, share)| {
            let what = format!(
                "slot {} has {:.0} % of the time, more than a shard's whole share, so it stays and is left out of account",
                slot.index(),
                share * 100.0
            );
            let remedy = "SHOW HOT KEYS names its key: RESHARD START ISOLATE KEY '…' TO another shard.";
            finding(Gravity::Warning, name(usize::from(slots.owner(*slot).0)), what, remedy)
        });
        let shares = self.shares.iter().enumerate().filter(|(_, share)| share.wanted > 0.0 || share.now > 0.0);
        let shares = shares.map(|(number, share)| {
            let percent = |part: f64| part * 100.0;
            let (now, then, wanted) = (percent(share.now), percent(share.then), percent(share.wanted));
            let what = format!("{now:.1} % of the time now, {then:.1} % then; its weight stands for {wanted:.1} %");
            finding(Gravity::Note, name(number), what, "")
        });
        hot.chain(shares).collect()
    }
}

fn nothing_to_move(measured: &Measured<'_>, balanced: &Balanced) -> UserError {
    let said = balanced.findings(measured.shards, measured.slots);
    let said: Vec<String> = said.iter().map(|finding| format!("{}: {}.", finding.shard, finding.what)).collect();
    let error =
        refused(sqlstate::INVALID_PARAMETER_VALUE, "there is nothing to move".to_owned()).detail(said.join("\n"));
    if balanced.hot.is_empty() {
        return error.hint(format!(
            "Shards within {:.0} % of their share are left alone, and so are those that no slot could help.",
            OUT * 100.0
        ));
    }
    error.hint("SHOW HOT KEYS names the keys of hot slots: RESHARD START ISOLATE KEY '…' TO another shard.")
}

/// A slot that is to move.
#[derive(Clone, Copy)]
struct Moved {
    slot: Slot,
    from: usize,
    to: usize,
}

/// What each shard has of the time, without the hot slots, and what it should have.
struct Scale {
    load: Vec<f64>,
    wanted: Vec<f64>,
    /// Has no hot slot, and a weight.
    may_take: Vec<bool>,
    hot: Vec<Slot>,
}

impl Scale {
    fn new(measured: &Measured<'_>) -> Self {
        let weights: Vec<f64> = measured.shards.iter().map(|shard| f64::from(shard.weight)).collect();
        let sum: f64 = weights.iter().sum::<f64>().max(1.0);
        let most = weights.iter().copied().fold(0.0, f64::max) / sum;
        let mut rest = measured.load.total().time_us;
        let too_much = rest * most * (1.0 + OUT);
        let is_hot = |time_us: f64| time_us > too_much;
        let hot: Vec<Slot> =
            measured.load.used().filter(|(_, cost)| is_hot(cost.time_us)).map(|(slot, _)| slot).collect();
        let mut load = vec![0.0; weights.len()];
        let mut may_take: Vec<bool> = weights.iter().map(|weight| *weight > 0.0).collect();
        for (slot, cost) in measured.load.used() {
            let owner = usize::from(measured.slots.owner(slot).0);
            if is_hot(cost.time_us) {
                may_take[owner] = false;
                rest -= cost.time_us;
            } else {
                load[owner] += cost.time_us;
            }
        }
        let wanted = weights.iter().map(|weight| rest.max(0.0) * weight / sum).collect();
        Scale { load, wanted, may_take, hot }
    }

    fn is_over(&self, shard: usize, by: f64) -> bool {
        self.load[shard] > self.wanted[shard] * (1.0 + by)
    }

    fn is_under(&self, shard: usize, by: f64) -> bool {
        self.may_take[shard] && self.load[shard] < self.wanted[shard] * (1.0 - by)
    }

    fn all(&self) -> std::ops::Range<usize> {
        0..self.load.len()
    }

    /// Moves slots until all shards are near to their share, or nothing fits.
    fn levelled(&mut self, measured: &Measured<'_>) -> Vec<Moved> {
        if !self.all().any(|shard| self.is_over(shard, OUT) || self.is_under(shard, OUT)) {
            return Vec::new();
        }
        let rows = |slot: Slot| measured.rows.get(&slot).map_or(0.0, |rows| rows.rows);
        let time = |slot: Slot| measured.load.of(slot).time_us;
        // Much time for few rows comes first.
        let worth = |slot: Slot| time(slot) / (1.0 + rows(slot));
        let mut of_shard: Vec<Vec<Slot>> = vec![Vec::new(); self.load.len()];
        for (slot, cost) in measured.load.used() {
            if cost.time_us > 0.0 && !self.hot.contains(&slot) {
                of_shard[usize::from(measured.slots.owner(slot).0)].push(slot);
            }
        }
        for slots in &mut of_shard {
            slots.sort_by(|one, other| worth(*other).total_cmp(&worth(*one)));
        }
        let mut givers: Vec<usize> = self.all().filter(|shard| self.is_over(*shard, 0.0)).collect();
        givers.sort_by(|one, other| self.excess(*other).total_cmp(&self.excess(*one)));
        let mut moved = Vec::new();
        for from in givers {
            for &slot in &of_shard[from] {
                if let Some(to) = self.taker(from, time(slot)) {
                    self.shift((from, to), time(slot));
                    moved.push(Moved { slot, from, to });
                }
            }
        }
        self.spare(&mut moved, (rows, time));
        moved
    }

    fn excess(&self, shard: usize) -> f64 {
        self.load[shard] - self.wanted[shard]
    }

    fn shift(&mut self, (from, to): (usize, usize), time: f64) {
        self.load[from] -= time;
        self.load[to] += time;
    }

    /// Who takes a slot of this time from this shard: whoever lacks most, if it is needed and fits. The giver keeps its share; the taker
    /// may get a little more than its own from one that has far too much.
    fn taker(&self, from: usize, time: f64) -> Option<usize> {
        if time > self.excess(from) {
            return None;
        }
        let is_needed = |to: usize| self.is_over(from, AIM) || self.is_under(to, AIM);
        let slack = if self.is_over(from, OUT) { AIM / 2.0 } else { 0.0 };
        let room = |to: usize| self.wanted[to] * (1.0 + slack) - self.load[to];
        let fits = |to: &usize| *to != from && self.may_take[*to] && is_needed(*to) && time <= room(*to);
        self.all().filter(fits).max_by(|one, other| room(*one).total_cmp(&room(*other)))
    }

    /// What turned out not to be needed stays, that with most rows first.
    fn spare(&mut self, moved: &mut Vec<Moved>, (rows, time): (impl Fn(Slot) -> f64, impl Fn(Slot) -> f64)) {
        moved.sort_by(|one, other| rows(other.slot).total_cmp(&rows(one.slot)));
        moved.retain(|one| {
            self.shift((one.to, one.from), time(one.slot));
            let is_needed = self.is_over(one.from, AIM) || self.is_under(one.to, AIM);
            if is_needed {
                self.shift((one.from, one.to), time(one.slot));
            }
            is_needed
        });
    }

    /// With the hot slots, of all the time there is.
    fn shares(&self, measured: &Measured<'_>, total: f64) -> Vec<Share> {
        let now = measured.load.by_shard(measured.slots, measured.shards.len());
        let weights: f64 = measured.shards.iter().map(|shard| f64::from(shard.weight)).sum();
        let hot = |shard: usize| -> f64 {
            let here = self.hot.iter().filter(|slot| usize::from(measured.slots.owner(**slot).0) == shard);
            here.map(|slot| measured.load.of(*slot).time_us).sum()
        };
        let share = |(number, shard): (usize, &Weighed)| Share {
            wanted: f64::from(shard.weight) / weights.max(1.0),
            now: now[number].time_us / total,
            then: (self.load[number] + hot(number)) / total,
        };
        measured.shards.iter().enumerate().map(share).collect()
    }
}

#[cfg(test)]
mod tests;
