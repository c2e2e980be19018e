//! Comparing both sides as of one position of the source's WAL, while its clients go on.

use anyhow::{Result, bail};
use tokio_postgres::{Client, SimpleQueryMessage};

use super::apply::Follower;
use super::{Mover, Side, guard, sql};

/// Differences that are named.
const NAMED_MAX: usize = 5;

/// Slot, rows, sum of their hashes.
type Sum = (String, String, String);

impl Mover {
    /// Errors: they differ, and where.
    pub(super) async fn verify(&mut self) -> Result<()> {
        if self.follower.is_none() {
            self.follower = Some(Follower::open(&self.pair, Side::Source).await?);
        }
        let mut server = self.pair.source.walsender().await?;
        let slot = format!("{}_verify TEMPORARY", self.pair.script.name());
        let (position, snapshot) = guard::export(&mut server, &slot).await?;
        let source = sql::plain(&self.pair.source).await?;
        sql::begin_snapshot(&source, &snapshot).await?;
        let target = sql::plain(&self.pair.target).await?;
        let Some(follower) = &mut self.follower else { bail!("nothing is followed") };
        follower.stop_at(position.0).await?;
        let mut differences = Vec::new();
        for table in &self.pair.tables {
            let checksum = self.pair.script.checksum(table);
            let (here, there) = tokio::try_join!(sums(&source, &checksum), sums(&target, &checksum))?;
            for slot in here.iter().chain(&there).filter(|sum| !here.contains(sum) || !there.contains(sum)) {
                let difference = format!("{} slot {}", table.quoted(), slot.0);
                if !differences.contains(&difference) {
                    differences.push(difference);
                }
            }
        }
        if !differences.is_empty() {
            let count = differences.len();
            differences.truncate(NAMED_MAX);
            bail!(
                "source and target differ in {count} slots: {}; RESHARD CANCEL gives the move up",
                differences.join(", ")
            );
        }
        Ok(())
    }
}

async fn sums(client: &Client, sql: &str) -> Result<Vec<Sum>> {
    let read = |message: SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let text = |index| row.get(index).unwrap_or_default().to_owned();
            Some((text(0), text(1), text(2)))
        }
        _ => None,
    };
    Ok(client.simple_query(sql).await?.into_iter().filter_map(read).collect())
}
