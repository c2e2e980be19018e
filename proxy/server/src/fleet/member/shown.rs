//! One proxy at one shard, as operators see it.

use weir_core::admin::PeerRow;

use super::{Member, now_us};
use crate::config::PeersMode;

impl Member {
    /// This proxy and the others it knows of here.
    pub(in crate::fleet) fn rows(&self, database: &str, shard: &str) -> Vec<PeerRow> {
        let Some(fleet) = &self.fleet else { return Vec::new() };
        let row = |role, address: &str| {
            let (database, shard, address) = (database.to_owned(), shard.to_owned(), address.to_owned());
            PeerRow { database, shard, address, role, mode: fleet.mode.as_str(), ..PeerRow::default() }
        };
        let own = PeerRow {
            state: self.standing().as_str(),
            lease_ms: Some(self.lease_left().as_millis() as u64),
            writes: self.told.lock().writes().len() as u64,
            ..row("self", &fleet.address)
        };
        let others = self.others.lock().clone();
        let (told, heard) = (self.told.lock(), self.heard.lock());
        let other = |(id, address, out): &(u64, String, bool)| PeerRow {
            state: match told.peer(*id) {
                _ if *out => "out",
                _ if fleet.mode == PeersMode::Push
                    && !heard.is_fresh(*id, fleet.lease.as_micros() as u64, now_us()) =>
                {
                    "silent"
                }
                Some(peer) if peer.is_told(|link| !link.is_down()) => "told",
                _ => "unheard",
            },
            writes: heard.count(*id) as u64,
            ..row("peer", address)
        };
        std::iter::once(own).chain(others.iter().map(other)).collect()
    }
}
