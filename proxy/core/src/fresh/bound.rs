//! Which server may answer a read.
//!
//! Invariant: at [`Level::Strict`] a replica answers only if nothing the read touches was pending when it started, its
//! own replay position, reported on the same connection just ahead of the query, covers every write known to those
//! words, and the words are unmoved when the answer is complete. What this file knows about a replica beforehand is
//! only a hint that saves hopeless tries.
//!
//! Non-goals: waiting for a replica to catch up, and preferring zones; both are the caller's.

use super::words::Observation;
use crate::id::Lsn;

/// How fresh reads must be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Level {
    /// Never older than what anybody was told, and never backwards.
    #[default]
    Strict,
    /// Never older than the session's own writes.
    Session,
    /// At most that many milliseconds behind, as the last probe saw it.
    Lag(u32),
    /// Any connected server.
    Any,
}

/// What the session itself wrote on this shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SessionMark {
    #[default]
    Nothing,
    /// Written, but the LSN is not known yet.
    Unknown,
    /// Written, at or below this LSN.
    At(Lsn),
}

/// A level together with what it needs to know of the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReadBound {
    pub level: Level,
    pub session: SessionMark,
}

impl From<Level> for ReadBound {
    /// Without knowledge of the session's writes; [`Level::Session`] then asks the primary.
    fn from(level: Level) -> Self {
        ReadBound { level, session: SessionMark::Unknown }
    }
}

impl ReadBound {
    /// Must a replica's answer be checked against the words once more before it is released?
    pub fn must_be_unmoved(self) -> bool {
        self.level == Level::Strict
    }
}

/// What is known of a replica before it is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaView {
    pub connected: bool,
    /// Statements under way on it from this proxy.
    pub outstanding: u32,
    /// The newest replay position it ever reported, by a probe or ahead of a query. Somebody has to keep probing: a
    /// replica that looks behind gets no reads that would show that it has caught up.
    pub last_known_replay: Lsn,
    /// Time since its replay was level with the primary, as the last probe saw it. `None`: not known.
    pub lag_ms: Option<u32>,
}

/// Where to send a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    Primary(PrimaryBecause),
    /// Index into the replicas, and the LSN its inline answer must cover ([`replica_answer_ok`]).
    Replica(usize, Lsn),
}

/// Why the primary answers a read that a replica might have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PrimaryBecause {
    NoReplica,
    WritePending,
    OwnWriteUnknown,
    ReplicasBehind,
    /// The replica that was tried reported that it had not replayed enough.
    ReplicaAnsweredBehind,
    /// A write began while the replica was answering.
    Moved,
}

impl PrimaryBecause {
    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            PrimaryBecause::NoReplica => "no_replica",
            PrimaryBecause::WritePending => "write_pending",
            PrimaryBecause::OwnWriteUnknown => "own_write_unknown",
            PrimaryBecause::ReplicasBehind => "replicas_behind",
            PrimaryBecause::ReplicaAnsweredBehind => "replica_answered_behind",
            PrimaryBecause::Moved => "moved",
        }
    }
}

impl std::fmt::Display for PrimaryBecause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PrimaryBecause::NoReplica => "no replica is connected",
            PrimaryBecause::WritePending => "a write of what it reads is under way",
            PrimaryBecause::OwnWriteUnknown => "the session's last write has no known position yet",
            PrimaryBecause::ReplicasBehind => "no replica is known to have replayed far enough",
            PrimaryBecause::ReplicaAnsweredBehind => "the replica had not replayed far enough",
            PrimaryBecause::Moved => "a write of what it reads began while the replica was answering",
        })
    }
}

/// Chooses the server for a read whose words look like `seen`.
pub fn choose(bound: impl Into<ReadBound>, seen: &Observation, replicas: &[ReplicaView]) -> Choice {
    let bound = bound.into();
    if !replicas.iter().any(|replica| replica.connected) {
        return Choice::Primary(PrimaryBecause::NoReplica);
    }
    let need = match bound.level {
        Level::Strict if seen.pending() => return Choice::Primary(PrimaryBecause::WritePending),
        Level::Strict => seen.lsn(),
        Level::Session => match bound.session {
            SessionMark::Nothing => Lsn(0),
            SessionMark::Unknown => return Choice::Primary(PrimaryBecause::OwnWriteUnknown),
            SessionMark::At(lsn) => lsn,
        },
        Level::Lag(_) | Level::Any => Lsn(0),
    };
    let may_try = |replica: &ReplicaView| {
        let fresh_enough = match bound.level {
            Level::Lag(ms_max) => replica.lag_ms.is_some_and(|ms| ms <= ms_max),
            Level::Strict | Level::Session | Level::Any => replica_answer_ok(need, replica.last_known_replay),
        };
        replica.connected && fresh_enough
    };
    let best =
        replicas.iter().enumerate().filter(|(_, replica)| may_try(replica)).min_by_key(|(_, one)| one.outstanding);
    match best {
        Some((index, _)) => Choice::Replica(index, need),
        None => Choice::Primary(PrimaryBecause::ReplicasBehind),
    }
}

/// WAL page size of a standard build; the clock refuses replicas of a server that has another one.
pub const WAL_PAGE_BYTES: u64 = 8192;
/// `SizeOfXLogShortPHD` and `SizeOfXLogLongPHD` (src/include/access/xlog_internal.h).
const SHORT_PAGE_HEADER: u64 = 24;
const LONG_PAGE_HEADER: u64 = 40;

/// Does a replica that has replayed up to `replay` have every record below `need`?
///
/// The insert position of an idle primary may lie just past a page header (after a segment switch: 40 bytes into the
/// segment) while a replica that has everything reports the start of the page. Allowing for it is exact: no record fits
/// between a page's start and the end of its header, a record that *begins* there is at least 24 bytes long and so ends
/// later than either offset, and one that reaches them from the previous page began before the page's start, so that a
/// replica which reports the page's start cannot be in the middle of it.
pub fn replica_answer_ok(need: Lsn, replay: Lsn) -> bool {
    let offset = need.0 % WAL_PAGE_BYTES;
    let need = match offset {
        SHORT_PAGE_HEADER | LONG_PAGE_HEADER => need.0 - offset,
        _ => need.0,
    };
    replay.0 >= need
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fresh::words::{WordSet, Words};

    fn replica(replay: u64, outstanding: u32) -> ReplicaView {
        ReplicaView { connected: true, outstanding, last_known_replay: Lsn(replay), lag_ms: None }
    }

    /// A look at one word that was last written at `lsn`.
    fn written_at(lsn: u64) -> Observation {
        let words = Words::new();
        let set = WordSet::from_indexes([5]);
        let intent = words.begin_write(&set).expect("room");
        words.end_write(intent, Some(Lsn(lsn)));
        words.observe(&set)
    }

    #[test]
    fn the_least_busy_replica_that_may_have_replayed_enough_is_asked() {
        let seen = written_at(1000);
        let replicas = [replica(1000, 3), replica(999, 0), replica(5000, 1)];
        assert_eq!(choose(Level::Strict, &seen, &replicas), Choice::Replica(2, Lsn(1000)));
        let gone = replicas.map(|one| ReplicaView { connected: one.last_known_replay != Lsn(5000), ..one });
        assert_eq!(choose(Level::Strict, &seen, &gone), Choice::Replica(0, Lsn(1000)));
    }

    #[test]
    fn the_primary_is_asked_with_a_reason() {
        use PrimaryBecause::*;
        let seen = written_at(1000);
        assert_eq!(choose(Level::Strict, &seen, &[]), Choice::Primary(NoReplica));
        let gone = [ReplicaView { connected: false, ..replica(9000, 0) }];
        assert_eq!(choose(Level::Any, &seen, &gone), Choice::Primary(NoReplica));
        assert_eq!(choose(Level::Strict, &seen, &[replica(999, 0)]), Choice::Primary(ReplicasBehind));
        assert_eq!(choose(Level::Session, &seen, &[replica(999, 0)]), Choice::Primary(OwnWriteUnknown));
        assert_eq!(choose(Level::Lag(500), &seen, &[replica(9000, 0)]), Choice::Primary(ReplicasBehind));

        let words = Words::new();
        let set = WordSet::from_indexes([5]);
        let _open = words.begin_write(&set).expect("room");
        let seen = words.observe(&set);
        assert_eq!(choose(Level::Strict, &seen, &[replica(9000, 0)]), Choice::Primary(WritePending));
        assert_eq!(choose(Level::Any, &seen, &[replica(0, 0)]), Choice::Replica(0, Lsn(0)));
    }

    #[test]
    fn looser_levels_ask_for_what_they_promise() {
        let seen = written_at(1000);
        let at = |session| ReadBound { level: Level::Session, session };
        assert_eq!(choose(at(SessionMark::Nothing), &seen, &[replica(0, 0)]), Choice::Replica(0, Lsn(0)));
        assert_eq!(choose(at(SessionMark::At(Lsn(70))), &seen, &[replica(70, 0)]), Choice::Replica(0, Lsn(70)));
        let lagging = [ReplicaView { lag_ms: Some(40), ..replica(0, 0) }];
        assert_eq!(choose(Level::Lag(40), &seen, &lagging), Choice::Replica(0, Lsn(0)));
        assert_eq!(choose(Level::Lag(39), &seen, &lagging), Choice::Primary(PrimaryBecause::ReplicasBehind));
        assert!(ReadBound::default().must_be_unmoved() && !at(SessionMark::Nothing).must_be_unmoved());
    }

    #[test]
    fn a_position_just_past_a_page_header_is_covered_by_the_page_start() {
        let parse = |text| Lsn::parse(text).expect("valid");
        // Measured: insert position and replay position of an idle pair after pg_switch_wal.
        assert!(replica_answer_ok(parse("0/1E000028"), parse("0/1E000000")));
        assert!(replica_answer_ok(parse("0/1E002018"), parse("0/1E002000")));
        assert!(!replica_answer_ok(parse("0/1E002018"), parse("0/1E001FF8")));
        assert!(!replica_answer_ok(parse("0/1E002020"), parse("0/1E002000")));
        assert!(!replica_answer_ok(parse("0/1E002030"), parse("0/1E002018")));
        assert!(replica_answer_ok(Lsn(0), Lsn(0)) && !replica_answer_ok(Lsn(1), Lsn(0)));
    }

    proptest! {
        /// Never more generous than a page header, and never stricter than plain comparison.
        #[test]
        fn allowance_is_bounded(need in 0_u64..1 << 40, behind in 0_u64..64) {
            let replay = need.saturating_sub(behind);
            let ok = replica_answer_ok(Lsn(need), Lsn(replay));
            prop_assert!(ok || behind > 0);
            if ok && replay < need {
                prop_assert!(replay / WAL_PAGE_BYTES == need / WAL_PAGE_BYTES);
                prop_assert!(need % WAL_PAGE_BYTES == 24 || need % WAL_PAGE_BYTES == 40);
            }
        }
    }
}
