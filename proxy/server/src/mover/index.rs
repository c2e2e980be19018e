//! Indexes of a shard that has joined with this move: they come when all rows are there, and before anything is compared.
//!
//! Invariant: they are made once, when nobody copies to the shard any more; changes are applied meanwhile.

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use weir_core::reshard::phase::{Aim, Phase};
use weir_core::reshard::throttle::Held;

use super::{Mover, Pair, Side, sql};
use crate::hub::moves::MoveRow;
use crate::reshard::late;

/// How far they are.
pub(super) enum Indexes {
    Unknown,
    Missing,
    /// One task, which ends with this.
    Making(JoinSet<Result<()>>),
}

impl Mover {
    /// True: nothing is missing.
    pub(super) async fn index(&mut self, row: &MoveRow) -> Result<bool> {
        self.follow(Side::Source).await?;
        match &mut self.indexes {
            Indexes::Unknown => {
                if !self.pair.lacks_indexes().await? {
                    return Ok(true);
                }
                self.indexes = Indexes::Missing;
            }
            Indexes::Missing => {
                self.progress.held = self.others_copy(row).await?.then_some(Held::Copies);
                if self.progress.held.is_none() {
                    let (pair, mut task) = (self.pair.clone(), JoinSet::new());
                    task.spawn(async move { pair.make_indexes().await });
                    self.indexes = Indexes::Making(task);
                }
            }
            Indexes::Making(task) => {
                if let Some(made) = task.try_join_next() {
                    self.indexes = Indexes::Unknown;
                    made.context("making indexes broke off")??;
                }
            }
        }
        Ok(false)
    }

    /// Does a move still bring rows to the same shard? One that stands still is not waited for.
    async fn others_copy(&self, row: &MoveRow) -> Result<bool> {
        let copies = |one: &MoveRow| matches!(one.phase, Phase::Queued | Phase::Prepare | Phase::Copy | Phase::Catchup);
        let moves = self.driving.moves().await?;
        Ok(moves
            .iter()
            .any(|one| one.id != row.id && one.to == row.to && copies(one) && !one.paused && one.aim != Aim::Cancelled))
    }
}

impl Pair {
    async fn lacks_indexes(&self) -> Result<bool> {
        let (source, target) = (sql::plain(&self.source).await?, sql::plain(&self.target).await?);
        Ok(!late::missing(&source, &target, &self.rules).await?.is_empty())
    }

    /// Those that a shard that has joined lacks; usually none.
    pub(super) async fn make_indexes(&self) -> Result<()> {
        let (source, target) = (sql::plain(&self.source).await?, sql::plain(&self.target).await?);
        late::make(&source, &target, (&self.rules, &self.config)).await
    }
}
