//! How far a move is, what is wanted of it, and what follows from both.
//!
//! Invariant: the owner of the slots changes in one step, from [`Phase::Cutover`] to [`Phase::Reverse`] or from [`Phase::Cutback`] to
//! [`Phase::ClearTarget`]; whoever takes a move over after a crash finds in its phase alone what is to be done next. Non-goal: doing it.

use crate::error::{Blame, UserError};
use crate::topology::moves::Stage;

/// What is being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Waits for its turn; nothing was touched.
    Queued,
    /// Everybody learns that the target will hold guests; guards, fences, publications and slots are made.
    Prepare,
    /// Rows are copied, as one snapshot of the source has them.
    Copy,
    /// Changes since that snapshot are applied.
    Catchup,
    /// What a new shard still lacks of indexes is made.
    Index,
    /// Both sides are compared at one position.
    Verify,
    /// In step; waits for the cut-over.
    Ready,
    /// Statements wait, the source is fenced, and the rest is applied.
    Cutover,
    /// The target owns the slots; what it writes is applied to the source, so that there is a way back.
    Reverse,
    /// The target owns the slots and what led back is lost: nothing can be given back any more, and the move waits for its end.
    Forward,
    /// As [`Phase::Cutover`], the other way round.
    Cutback,
    /// The source owns the slots; what the target has of them is deleted.
    ClearTarget,
    /// The target owns the slots for good; what the source has of them is deleted.
    ClearSource,
    Done,
    Cancelled,
    RolledBack,
}

impl Phase {
    pub const ALL: [Phase; 16] = [
        Phase::Queued,
        Phase::Prepare,
        Phase::Copy,
        Phase::Catchup,
        Phase::Index,
        Phase::Verify,
        Phase::Ready,
        Phase::Cutover,
        Phase::Reverse,
        Phase::Forward,
        Phase::Cutback,
        Phase::ClearTarget,
        Phase::ClearSource,
        Phase::Done,
        Phase::Cancelled,
        Phase::RolledBack,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Queued => "queued",
            Phase::Prepare => "prepare",
            Phase::Copy => "copy",
            Phase::Catchup => "catchup",
            Phase::Index => "index",
            Phase::Verify => "verify",
            Phase::Ready => "ready",
            Phase::Cutover => "cutover",
            Phase::Reverse => "reverse",
            Phase::Forward => "forward",
            Phase::Cutback => "cutback",
            Phase::ClearTarget => "clear_target",
            Phase::ClearSource => "clear_source",
            Phase::Done => "done",
            Phase::Cancelled => "cancelled",
            Phase::RolledBack => "rolled_back",
        }
    }

    pub fn parse(text: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.as_str() == text)
    }

    /// What statements must know of it; `None`: nothing.
    pub fn stage(self) -> Option<Stage> {
        match self {
            Phase::Queued | Phase::Done | Phase::Cancelled | Phase::RolledBack => None,
            Phase::Prepare
            | Phase::Copy
            | Phase::Catchup
            | Phase::Index
            | Phase::Verify
            | Phase::Ready
            | Phase::ClearTarget => Some(Stage::Copying),
            Phase::Cutover => Some(Stage::Cutting),
            Phase::Reverse | Phase::Forward | Phase::ClearSource => Some(Stage::Moved),
            Phase::Cutback => Some(Stage::Returning),
        }
    }

    pub fn is_final(self) -> bool {
        matches!(self, Phase::Done | Phase::Cancelled | Phase::RolledBack)
    }

    /// Do statements wait for its end?
    pub fn is_awaited(self) -> bool {
        matches!(self, Phase::Cutover | Phase::Cutback)
    }

    /// Does it stay there until somebody says something?
    pub fn rests(self) -> bool {
        self.is_final() || matches!(self, Phase::Ready | Phase::Reverse | Phase::Forward)
    }

    /// Before the owner has changed: may it be given up without a trace?
    fn is_before_cutover(self) -> bool {
        matches!(
            self,
            Phase::Queued
                | Phase::Prepare
                | Phase::Copy
                | Phase::Catchup
                | Phase::Index
                | Phase::Verify
                | Phase::Ready
                | Phase::Cutover
        )
    }

    /// Does a slot of the source keep WAL for it, and is what it was copied from still needed?
    pub fn follows_source(self) -> bool {
        matches!(self, Phase::Catchup | Phase::Index | Phase::Verify | Phase::Ready)
    }

    /// Has it something that it would have to begin again without: guards, and a slot of the source?
    pub fn may_begin_again(self) -> bool {
        self == Phase::Copy || self.follows_source()
    }

    /// Does it read or write so much that it is worth a pause?
    fn may_pause(self) -> bool {
        self.may_begin_again() || matches!(self, Phase::Queued | Phase::Reverse)
    }
}

/// How far a move is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Aim {
    /// In step with the source, and no further.
    Ready,
    /// The target owns the slots, and the way back is open.
    Moved,
    /// The target owns them, and nothing is left of the move.
    Complete,
    /// The source owns them again.
    Back,
    /// Given up before the owner has changed.
    Cancelled,
}

impl Aim {
    pub const ALL: [Aim; 5] = [Aim::Ready, Aim::Moved, Aim::Complete, Aim::Back, Aim::Cancelled];

    pub fn as_str(self) -> &'static str {
        match self {
            Aim::Ready => "ready",
            Aim::Moved => "moved",
            Aim::Complete => "complete",
            Aim::Back => "back",
            Aim::Cancelled => "cancelled",
        }
    }

    pub fn parse(text: &str) -> Option<Aim> {
        Aim::ALL.into_iter().find(|aim| aim.as_str() == text)
    }
}

/// Where a move goes from a resting place, if it goes on at all.
pub fn next(phase: Phase, aim: Aim) -> Option<Phase> {
    match (phase, aim) {
        (Phase::Queued, Aim::Cancelled) => Some(Phase::Cancelled),
        (Phase::Prepare, Aim::Cancelled) => Some(Phase::ClearTarget),
        (phase, Aim::Cancelled) if phase.may_begin_again() => Some(Phase::ClearTarget),
        (Phase::Ready, Aim::Moved | Aim::Complete) => Some(Phase::Cutover),
        (Phase::Reverse | Phase::Forward, Aim::Complete) => Some(Phase::ClearSource),
        (Phase::Reverse, Aim::Back) => Some(Phase::Cutback),
        _ => None,
    }
}

/// What a DBA says to moves that run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Cutover,
    Complete,
    Rollback,
    Cancel,
    Pause,
    Resume,
    Verify,
}

impl Order {
    pub const ALL: [Order; 7] =
        [Order::Cutover, Order::Complete, Order::Rollback, Order::Cancel, Order::Pause, Order::Resume, Order::Verify];

    pub fn as_str(self) -> &'static str {
        match self {
            Order::Cutover => "CUTOVER",
            Order::Complete => "COMPLETE",
            Order::Rollback => "ROLLBACK",
            Order::Cancel => "CANCEL",
            Order::Pause => "PAUSE",
            Order::Resume => "RESUME",
            Order::Verify => "VERIFY",
        }
    }
}

/// What an order makes of a move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Made {
    Aim(Aim),
    Paused(bool),
    /// Compare once more.
    Phase(Phase),
}

/// May this be said to a move in this phase? Errors: 55000 with what may be said instead.
pub fn order(phase: Phase, order: Order) -> Result<Made, UserError> {
    let made = match order {
        Order::Cutover if phase.is_before_cutover() => Made::Aim(Aim::Moved),
        Order::Complete if matches!(phase, Phase::Reverse | Phase::Forward | Phase::ClearSource) => {
            Made::Aim(Aim::Complete)
        }
        Order::Rollback if matches!(phase, Phase::Reverse | Phase::Cutback) => Made::Aim(Aim::Back),
        Order::Cancel if phase.is_before_cutover() => Made::Aim(Aim::Cancelled),
        Order::Pause if phase.may_pause() => Made::Paused(true),
        Order::Resume => Made::Paused(false),
        Order::Verify if matches!(phase, Phase::Catchup | Phase::Ready) => Made::Phase(Phase::Verify),
        _ => return Err(not_now(phase, order)),
    };
    Ok(made)
}

fn not_now(phase: Phase, order: Order) -> UserError {
    let hint = match phase {
        Phase::Forward if order == Order::Rollback => {
            "What the target has written since cannot be told any more (SHOW MOVES says why). RESHARD COMPLETE ends the move; \
             then RESHARD START MOVE SLOTS … TO … moves them back."
        }
        Phase::Forward => "RESHARD COMPLETE ends it.",
        Phase::Reverse => "RESHARD COMPLETE ends it, RESHARD ROLLBACK gives the slots back.",
        phase if phase.is_final() => "It is over. SHOW MOVES lists all.",
        phase if phase.is_before_cutover() => "RESHARD CUTOVER hands the slots over, RESHARD CANCEL gives the move up.",
        _ => "Wait until this phase is over; SHOW MOVES tells how far it is.",
    };
    let message = format!("RESHARD {} is not possible in phase {}", order.as_str(), phase.as_str());
    UserError::new(Blame::Client, "55000", message).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for phase in Phase::ALL {
            assert_eq!(Phase::parse(phase.as_str()), Some(phase));
        }
        for aim in Aim::ALL {
            assert_eq!(Aim::parse(aim.as_str()), Some(aim));
        }
    }

    #[test]
    fn an_aim_that_may_be_given_is_an_aim_that_is_reached() {
        // Phases that end by themselves, and where they lead.
        let after = |phase| match phase {
            Phase::Queued => Phase::Prepare,
            Phase::Prepare => Phase::Copy,
            Phase::Copy => Phase::Catchup,
            Phase::Catchup => Phase::Index,
            Phase::Index => Phase::Verify,
            Phase::Verify => Phase::Ready,
            Phase::Cutover => Phase::Reverse,
            Phase::ClearSource => Phase::Done,
            resting => resting,
        };
        for start in Phase::ALL.into_iter().filter(|phase| !phase.is_final()) {
            for said in Order::ALL {
                let Ok(Made::Aim(aim)) = order(start, said) else { continue };
                let mut phase = start;
                for _ in 0..20 {
                    phase = match (phase, aim) {
                        (Phase::Cutback, _) => Phase::ClearTarget,
                        (Phase::ClearTarget, Aim::Back) => Phase::RolledBack,
                        (Phase::ClearTarget, _) => Phase::Cancelled,
                        // A cut-over that is given up falls back to catching up.
                        (Phase::Cutover, Aim::Cancelled) => Phase::Catchup,
                        _ => next(phase, aim).unwrap_or_else(|| after(phase)),
                    };
                }
                let expected = match aim {
                    Aim::Ready => Phase::Ready,
                    Aim::Moved => Phase::Reverse,
                    Aim::Complete => Phase::Done,
                    Aim::Back => Phase::RolledBack,
                    Aim::Cancelled => Phase::Cancelled,
                };
                assert_eq!(phase, expected, "{said:?} in {start:?}");
            }
        }
    }

    #[test]
    fn the_owner_changes_in_two_places_only() {
        let owner = |phase: Phase| match phase.stage() {
            None => None,
            Some(Stage::Copying | Stage::Cutting) => Some("source"),
            Some(Stage::Moved | Stage::Returning) => Some("target"),
        };
        for phase in Phase::ALL {
            for aim in Aim::ALL {
                if let Some(next) = next(phase, aim)
                    && let (Some(before), Some(after)) = (owner(phase), owner(next))
                {
                    assert_eq!(before, after, "{phase:?} to {next:?}");
                }
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_does() {
        for (phase, said) in [
            (Phase::Reverse, Order::Cancel),
            (Phase::Copy, Order::Rollback),
            (Phase::Done, Order::Cutover),
            (Phase::ClearSource, Order::Rollback),
            (Phase::Forward, Order::Rollback),
            (Phase::Forward, Order::Cancel),
            (Phase::Copy, Order::Complete),
        ] {
            let error = order(phase, said).expect_err("refused");
            assert_eq!(error.sqlstate, "55000");
            assert!(error.hint.is_some());
        }
    }
}
