//! How weir itself logs in to the primaries of a database's shards, and which of them it has to look after.
//!
//! Invariant: as many logins as there are shards in the list, by number; which of them take part is what the topology in force says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use weir_core::id::ShardId;
use weir_core::topology::Roster;

use crate::back::connect::Login;
use crate::growing::Growing;

/// So long is a shard looked after that takes part no more: decisions of transactions that had begun there may still be asked for.
const LINGERS: Duration = Duration::from_secs(120);

pub struct Primaries {
    logins: Growing<Login>,
    roster: ArcSwap<Roster>,
    /// Who has left while this process ran, and when.
    left: Mutex<Vec<(ShardId, Instant)>>,
}

impl Primaries {
    pub fn new(logins: Vec<Login>, roster: &Roster) -> Arc<Self> {
        Arc::new(Primaries {
            logins: logins.into_iter().collect(),
            roster: ArcSwap::from_pointee(roster.clone()),
            left: Mutex::default(),
        })
    }

    pub fn of(&self, shard: ShardId) -> &Login {
        &self.logins[shard]
    }

    /// Of the shards that take part, ascending.
    pub fn active(&self) -> Vec<(ShardId, Login)> {
        self.roster.load().active().iter().map(|shard| (*shard, self.logins[*shard].clone())).collect()
    }

    /// The same, and those that did a moment ago.
    pub fn lately_active(&self) -> Vec<(ShardId, Login)> {
        let mut left = self.left.lock();
        left.retain(|(_, since)| since.elapsed() < LINGERS);
        let left = left.iter().map(|(shard, _)| (*shard, self.logins[*shard].clone()));
        self.active().into_iter().chain(left).collect()
    }

    pub fn is_active(&self, shard: ShardId) -> bool {
        self.roster.load().is_active(shard)
    }

    pub(super) fn push(&self, login: Login) -> Option<usize> {
        self.logins.push(login)
    }

    pub(super) fn install(&self, roster: &Roster, now: Instant) {
        let last = self.roster.swap(Arc::new(roster.clone()));
        let leave = last.active().iter().filter(|shard| !roster.is_active(**shard));
        self.left.lock().extend(leave.map(|shard| (*shard, now)));
    }
}
