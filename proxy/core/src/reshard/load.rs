//! What slots cost the servers: statements, and the time they take, as sums that forget.
//!
//! Invariant: what was counted [`HALF_LIFE_S`] ago weighs half of what is counted now; a rate is what was counted over the time that
//! weighs alike, so one that was measured for a minute is as true as one of an hour, only less certain.
//! Non-goals: counting itself (the server's, on the way of every statement), and what follows from it ([`super::balance`]).

use crate::id::Slot;
use crate::topology::SlotMap;

/// After so many seconds, what was counted weighs half.
pub const HALF_LIFE_S: f64 = 300.0;

/// What the statements of a slot cost. Of sums: statements and microseconds; of rates: the same per second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Cost {
    pub statements: f64,
    /// From a statement's arrival to the end of its answer, without its wait for a server connection.
    pub time_us: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.statements += other.statements;
        self.time_us += other.time_us;
    }
}

/// A cost for every slot.
#[derive(Clone, PartialEq, Debug)]
pub struct SlotLoad(Box<[Cost]>);

impl Default for SlotLoad {
    fn default() -> Self {
        SlotLoad(vec![Cost::default(); Slot::COUNT].into())
    }
}

impl SlotLoad {
    pub fn of(&self, slot: Slot) -> Cost {
        self.0[slot.index()]
    }

    pub fn add(&mut self, slot: Slot, cost: Cost) {
        self.0[slot.index()] += cost;
    }

    /// Those that cost anything, ascending.
    pub fn used(&self) -> impl Iterator<Item = (Slot, Cost)> {
        Slot::all().zip(self.0.iter().copied()).filter(|(_, cost)| cost.statements > 0.0 || cost.time_us > 0.0)
    }

    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.0.iter().for_each(|cost| total += *cost);
        total
    }

    /// By owner, for the shards `0..shards`.
    pub fn by_shard(&self, slots: &SlotMap, shards: usize) -> Vec<Cost> {
        let mut sums = vec![Cost::default(); shards];
        for (slot, cost) in self.used() {
            if let Some(sum) = sums.get_mut(usize::from(slots.owner(slot).0)) {
                *sum += cost;
            }
        }
        sums
    }

    /// The `most` slots that cost most time, the costliest first.
    pub fn costliest(&self, most: usize) -> Vec<(Slot, Cost)> {
        let mut used: Vec<(Slot, Cost)> = self.used().collect();
        used.sort_by(|one, other| other.1.time_us.total_cmp(&one.1.time_us).then(one.0.cmp(&other.0)));
        used.truncate(most);
        used
    }
}

/// Sums that forget.
#[derive(Clone, Debug, Default)]
pub struct Decayed {
    sums: SlotLoad,
    /// Seconds that were measured, forgotten alike.
    seconds: f64,
}

impl Decayed {
    /// So much has come to pass in the last `seconds`.
    pub fn pass(&mut self, seconds: f64, counted: impl Iterator<Item = (Slot, Cost)>) {
        let kept = (-seconds.max(0.0) / HALF_LIFE_S).exp2();
        self.seconds = self.seconds * kept + seconds.max(0.0);
        for cost in &mut self.sums.0 {
            cost.statements *= kept;
            cost.time_us *= kept;
        }
        counted.for_each(|(slot, cost)| self.sums.add(slot, cost));
    }

    /// Per second; slots that have hardly been used any more are left out.
    pub fn rates(&self) -> SlotLoad {
        /// One statement in a quarter of an hour.
        const LEAST: f64 = 0.001;
        let mut rates = SlotLoad::default();
        if self.seconds > 0.0 {
            let rate =
                |sum: Cost| Cost { statements: sum.statements / self.seconds, time_us: sum.time_us / self.seconds };
            let used = self.sums.used().map(|(slot, sum)| (slot, rate(sum)));
            used.filter(|(_, rate)| rate.statements >= LEAST).for_each(|(slot, rate)| rates.add(slot, rate));
        }
        rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ShardId;

    fn slot(number: u16) -> Slot {
        Slot::new(number).expect("a slot")
    }

    fn cost(statements: f64) -> Cost {
        Cost { statements, time_us: statements * 50.0 }
    }

    #[test]
    fn a_steady_load_has_its_own_rate_from_the_first_second_on() {
        let mut decayed = Decayed::default();
        assert_eq!(decayed.rates(), SlotLoad::default());
        for _ in 0..200 {
            decayed.pass(10.0, [(slot(7), cost(120.0))].into_iter());
            let rate = decayed.rates().of(slot(7));
            assert!((rate.statements - 12.0).abs() < 1e-6 && (rate.time_us - 600.0).abs() < 1e-4, "{rate:?}");
        }
    }

    #[test]
    fn what_is_over_is_forgotten_by_halves() {
        let mut decayed = Decayed::default();
        for _ in 0..1000 {
            decayed.pass(10.0, [(slot(1), cost(100.0))].into_iter());
        }
        for _ in 0..30 {
            decayed.pass(10.0, [(slot(2), cost(100.0))].into_iter());
        }
        let rates = decayed.rates();
        let (old, new) = (rates.of(slot(1)).statements, rates.of(slot(2)).statements);
        assert!((old - 5.0).abs() < 0.1 && (new - 5.0).abs() < 0.1, "{old} {new}");
        decayed.pass(HALF_LIFE_S * 30.0, std::iter::empty());
        assert_eq!(decayed.rates().used().count(), 0, "hardly anything is nothing");
    }

    #[test]
    fn sums_are_by_owner_and_the_costliest_come_first() {
        let mut load = SlotLoad::default();
        for (number, statements) in [(0, 1.0), (1, 5.0), (4095, 3.0)] {
            load.add(slot(number), cost(statements));
        }
        let owners = Slot::all().map(|slot| ShardId(u16::from(slot.index() > 2000))).collect();
        let sums = load.by_shard(&SlotMap::new(owners).expect("all slots"), 2);
        assert_eq!(sums, [cost(6.0), cost(3.0)]);
        assert_eq!(load.total(), cost(9.0));
        let first: Vec<usize> = load.costliest(2).iter().map(|(slot, _)| slot.index()).collect();
        assert_eq!(first, [1, 4095]);
    }
}
