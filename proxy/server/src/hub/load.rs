//! What each proxy has measured of slots, a row per proxy.

use weir_core::id::Slot;
use weir_core::reshard::load::{Cost, SlotLoad};

use super::{Hub, HubError, bounded};

/// What has not been written again for so long is of a proxy that is gone.
const STALE_AFTER: &str = "2 minutes";

impl Hub {
    /// This proxy has measured these rates; none takes its row away, and those of proxies that are long gone go with it.
    pub async fn tell_load(&self, database: &str, proxy: &str, rates: &SlotLoad) -> Result<(), HubError> {
        bounded(async {
            let client = self.client().await?;
            let (mut slots, mut statements, mut times) = (Vec::new(), Vec::new(), Vec::new());
            for (slot, cost) in rates.used() {
                slots.push(slot.index() as i16);
                statements.push(cost.statements);
                times.push(cost.time_us);
            }
            let gone = "DELETE FROM weir.slot_load WHERE (database, proxy) = ($1, $2) AND $3 OR seen < clock_timestamp() - interval '1 hour'";
            client.execute(gone, &[&database, &proxy, &slots.is_empty()]).await?;
            if !slots.is_empty() {
                let sql = "INSERT INTO weir.slot_load (database, proxy, seen, slots, statements, time_us) \
                           VALUES ($1, $2, clock_timestamp(), $3, $4, $5) ON CONFLICT (database, proxy) DO UPDATE \
                           SET seen = excluded.seen, slots = excluded.slots, statements = excluded.statements, time_us = excluded.time_us";
                client.execute(sql, &[&database, &proxy, &slots, &statements, &times]).await?;
            }
            Ok(())
        })
        .await
    }

    /// The rates of all proxies but this one together, as they were last told.
    pub async fn load_of_others(&self, database: &str, proxy: &str) -> Result<SlotLoad, HubError> {
        bounded(async {
            let sql = format!(
                "SELECT one.slot, sum(one.statements), sum(one.time_us) \
                 FROM weir.slot_load l, unnest(l.slots, l.statements, l.time_us) AS one(slot, statements, time_us) \
                 WHERE l.database = $1 AND l.proxy <> $2 AND l.seen > clock_timestamp() - interval '{STALE_AFTER}' GROUP BY one.slot"
            );
            let mut load = SlotLoad::default();
            for row in self.client().await?.query(&sql, &[&database, &proxy]).await? {
                let cost = Cost { statements: row.try_get(1)?, time_us: row.try_get(2)? };
                if let Some(slot) = u16::try_from(row.try_get::<_, i16>(0)?).ok().and_then(Slot::new) {
                    load.add(slot, cost);
                }
            }
            Ok(load)
        })
        .await
    }
}
