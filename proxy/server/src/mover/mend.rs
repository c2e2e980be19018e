//! What a move has lost with a server: slots, guards and fences, after a promotion or where WAL was thrown away.
//!
//! Invariant: before the owner has changed, what is lost is made anew from the beginning. After it nothing is copied again: guards and
//! fences are put back, and if what the target wrote cannot be followed any more, the way back is given up and the slots stay.
//! Non-goal: rows that a promotion has lost; who needs them waits for synchronous standbys.

use anyhow::Result;
use weir_core::reshard::phase::Phase;

use super::{Mover, Side, guard, sql};
use crate::hub::moves::MoveRow;

impl Mover {
    /// At the beginning of every attempt.
    pub(super) async fn mend(&mut self) -> Result<()> {
        let row = self.driving.move_now(self.pair.id).await?;
        if row.paused {
            return Ok(());
        }
        match row.phase {
            phase if phase.may_begin_again() => self.begin_again(&row).await,
            Phase::Cutover => self.put_back(Side::Source).await,
            Phase::Cutback | Phase::Forward => self.put_back(Side::Target).await,
            Phase::Reverse => {
                // Its rows are not on the source, so they would be lost on the way back.
                if let Some(table) = self.came_since().await? {
                    return self
                        .strand(&row, &format!("{table} was made since, and its rows did not come along"))
                        .await;
                }
                self.put_back(Side::Target).await?;
                match self.broken(Side::Target).await? {
                    Some(why) => self.strand(&row, &format!("the target cannot be followed, {why}")).await,
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    async fn begin_again(&self, row: &MoveRow) -> Result<()> {
        let mut why = None;
        for side in [Side::Source, Side::Target] {
            if !guard::stands(&self.pair, side).await? {
                why = Some(format!("guards of the {} are gone, as after a promotion", side.name()));
            }
        }
        // A copy makes its slot itself.
        if why.is_none() && row.phase != Phase::Copy {
            why = self.broken(Side::Source).await?.map(|why| format!("the source cannot be followed: {why}"));
        }
        match why {
            Some(why) => {
                let what = format!("begun again in phase {}: {why}", row.phase.as_str());
                tracing::warn!(move_id = self.pair.id, "{what}");
                self.driving.step(row, Phase::Prepare, None).await?;
                self.driving.notice(self.pair.id, &what).await?;
            }
            // Its slot may be lost alone, and the target has written nothing yet.
            None if row.phase == Phase::Ready && self.broken(Side::Target).await?.is_some() => {
                guard::way_back(&self.pair).await?;
                guard::advance_way_back(&self.pair).await?;
            }
            None => {}
        }
        Ok(())
    }

    /// Guards and fences as they have to be where `owner` has the slots.
    async fn put_back(&self, owner: Side) -> Result<()> {
        if !(guard::stands(&self.pair, Side::Source).await? && guard::stands(&self.pair, Side::Target).await?) {
            guard::prepare(&self.pair, owner).await?;
        }
        self.close(owner.other()).await?;
        self.reopen(owner).await
    }

    /// A table of the target's that has no guard, where others have.
    async fn came_since(&self) -> Result<Option<String>> {
        let client = sql::plain(self.pair.at(Side::Target)).await?;
        let asked = sql::prepare_described(&client).await?;
        let tables = sql::described((&client, &asked), &self.pair.rules, &self.pair.script).await?;
        if tables.values().all(|(_, is_minded)| !is_minded) {
            return Ok(None);
        }
        Ok(tables.into_iter().find(|(_, (_, is_minded))| !is_minded).map(|(table, _)| table))
    }

    async fn strand(&mut self, row: &MoveRow, why: &str) -> Result<()> {
        let what = format!("there is no way back any more: {why}");
        tracing::warn!(move_id = self.pair.id, "{what}");
        self.driving.notice(self.pair.id, &what).await?;
        self.driving.step(row, Phase::Forward, None).await?;
        // What is there keeps WAL for nobody.
        for side in [Side::Source, Side::Target] {
            sql::drop_slot(&sql::plain(self.pair.at(side)).await?, &self.pair.script.name()).await?;
        }
        Ok(())
    }

    /// Why the other side cannot go on with what `from` writes.
    async fn broken(&self, from: Side) -> Result<Option<&'static str>> {
        let into = sql::plain(self.pair.at(from.other())).await?;
        let applied: i64 = into.query_one(&self.pair.script.ask_applied(), &[]).await?.try_get(0)?;
        sql::broken(&sql::plain(self.pair.at(from)).await?, &self.pair.script.name(), applied).await
    }
}
