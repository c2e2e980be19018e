//! Which server may answer a read.
//!
//! Invariant: at [`Level::Strict`] a replica answers only if nothing the read touches was pending when it started, its
//! own replay position, reported on the same connection just ahead of the query, covers every write known to those
//! words, and the words are unmoved when the answer is complete. What this file knows about a replica beforehand is
//! only a hint that saves hopeless tries.
//!
//! Non-goals: waiting for a replica to catch up ([`super::pace`] says when that is worth it), and preferring zones.

use super::words::{Observation, UNPLACED};
use crate::id::Lsn;

/// How fresh reads must be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Level {
    /// Never older than what anybody was told, and never backwards.
    #[default]
    Strict,
    /// Never older than the session's own writes.
    Session,
    /// At most that many milliseconds behind.
    Lag(u32),
    /// Any connected server.
    Any,
}

/// Longest lag that can be asked for: an hour.
const LAG_MS_MAX: u32 = 3_600_000;

impl Level {
    /// As configuration, hints and `SET weir.freshness` spell it: `strict`, `session`, `any`, `lag <= 500ms` (or `s`, `min`).
    pub fn parse(text: &str) -> Option<Level> {
        match text.trim() {
            "strict" => Some(Level::Strict),
            "session" => Some(Level::Session),
            "any" => Some(Level::Any),
            lag => {
                let bound = lag.strip_prefix("lag")?.trim_start().strip_prefix("<=")?.trim_start();
                let digits = bound.find(|char: char| !char.is_ascii_digit())?;
                let unit = match bound[digits..].trim_start() {
                    "ms" => 1,
                    "s" => 1000,
                    "min" => 60_000,
                    _ => return None,
                };
                let ms = bound[..digits].parse::<u32>().ok()?.checked_mul(unit)?;
                (1..=LAG_MS_MAX).contains(&ms).then_some(Level::Lag(ms))
            }
        }
    }

    /// What [`Level::parse`] understands, for messages.
    pub const SPELLINGS: &str = "strict, session, lag <= 500ms, any";

    /// One number for an atomic; [`Level::unpacked`] is the way back.
    pub fn packed(self) -> u64 {
        match self {
            Level::Strict => 0,
            Level::Session => 1,
            Level::Any => 2,
            Level::Lag(ms) => 3 | u64::from(ms) << 8,
        }
    }

    pub fn unpacked(packed: u64) -> Level {
        match packed & 0xff {
            1 => Level::Session,
            2 => Level::Any,
            3 => Level::Lag((packed >> 8) as u32),
            _ => Level::Strict,
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Level::Strict => f.write_str("strict"),
            Level::Session => f.write_str("session"),
            Level::Lag(ms) => write!(f, "lag <= {ms}ms"),
            Level::Any => f.write_str("any"),
        }
    }
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

/// A level with what it takes to keep it at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadBound {
    #[default]
    Strict,
    Session(SessionMark),
    /// A position that the primary had no longer ago than the level allows, see [`super::past::Past`]. `None`: none is known.
    Lag(Option<Lsn>),
    Any,
}

impl ReadBound {
    /// Must a replica's answer be checked against the words once more before it is released?
    pub fn must_be_unmoved(self) -> bool {
        self == ReadBound::Strict
    }

    /// What a replica must have replayed for a read whose words look like `seen`.
    pub fn need(self, seen: &Observation) -> Result<Lsn, PrimaryBecause> {
        match self {
            ReadBound::Strict if seen.pending() => Err(PrimaryBecause::WritePending),
            ReadBound::Strict => Ok(seen.lsn()),
            ReadBound::Session(SessionMark::Nothing) | ReadBound::Any => Ok(Lsn(0)),
            ReadBound::Session(SessionMark::Unknown) => Err(PrimaryBecause::OwnWriteUnknown),
            ReadBound::Session(SessionMark::At(lsn)) => Ok(lsn),
            ReadBound::Lag(past) => past.ok_or(PrimaryBecause::LagUnknown),
        }
    }
}

/// What is known of a replica before it is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaView {
    pub connected: bool,
    /// In this proxy's zone, or nobody has said which that is.
    pub is_near: bool,
    /// Statements under way on it from this proxy.
    pub outstanding: u32,
    /// The newest replay position it ever reported, by a probe or ahead of a query.
    pub last_known_replay: Lsn,
    /// That was long enough ago to ask again: a replica that looked behind and got no reads for it could not show that it has
    /// caught up.
    pub may_have_moved: bool,
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
    /// Whether the primary is still the same is not known, so neither is what its positions mean.
    ClockDown,
    /// Somebody else writes in the same database, and is not heard of ([`super::sign`]).
    AnotherWeir,
    /// Other proxies may not be able to tell this one of their writes.
    NoLease,
    /// It reads something that ordinary writes do not announce.
    Unwatched,
    WritePending,
    OwnWriteUnknown,
    LagUnknown,
    ReplicasBehind,
    /// One was nearly far enough, and the read waited for it as long as it may.
    WaitedInVain,
    /// The replica that was tried reported that it had not replayed enough.
    ReplicaAnsweredBehind,
    /// The replica that was tried could not be reached, was busy, or failed.
    ReplicaFailed,
    /// The answer is too large to be held back until it is proven.
    TooLarge,
    /// A write began while the replica was answering.
    Moved,
}

impl PrimaryBecause {
    /// In order of declaration.
    pub const ALL: [PrimaryBecause; 14] = [
        PrimaryBecause::NoReplica,
        PrimaryBecause::ClockDown,
        PrimaryBecause::AnotherWeir,
        PrimaryBecause::NoLease,
        PrimaryBecause::Unwatched,
        PrimaryBecause::WritePending,
        PrimaryBecause::OwnWriteUnknown,
        PrimaryBecause::LagUnknown,
        PrimaryBecause::ReplicasBehind,
        PrimaryBecause::WaitedInVain,
        PrimaryBecause::ReplicaAnsweredBehind,
        PrimaryBecause::ReplicaFailed,
        PrimaryBecause::TooLarge,
        PrimaryBecause::Moved,
    ];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            PrimaryBecause::NoReplica => "no_replica",
            PrimaryBecause::ClockDown => "clock_down",
            PrimaryBecause::AnotherWeir => "another_weir",
            PrimaryBecause::NoLease => "no_lease",
            PrimaryBecause::Unwatched => "unwatched",
            PrimaryBecause::WritePending => "write_pending",
            PrimaryBecause::OwnWriteUnknown => "own_write_unknown",
            PrimaryBecause::LagUnknown => "lag_unknown",
            PrimaryBecause::ReplicasBehind => "replicas_behind",
            PrimaryBecause::WaitedInVain => "waited_in_vain",
            PrimaryBecause::ReplicaAnsweredBehind => "replica_answered_behind",
            PrimaryBecause::ReplicaFailed => "replica_failed",
            PrimaryBecause::TooLarge => "too_large",
            PrimaryBecause::Moved => "moved",
        }
    }
}

impl std::fmt::Display for PrimaryBecause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PrimaryBecause::NoReplica => "no replica is connected",
            PrimaryBecause::ClockDown => "the primary does not tell its WAL position",
            PrimaryBecause::AnotherWeir => "another weir without common [peers] may be writing in the same database",
            PrimaryBecause::NoLease => "other proxies may be unable to tell this one of their writes",
            PrimaryBecause::Unwatched => "it reads something that writes do not announce",
            PrimaryBecause::WritePending => "a write of what it reads is under way",
            PrimaryBecause::OwnWriteUnknown => "the session's last write has no known position yet",
            PrimaryBecause::LagUnknown => "no position of the primary is known that is young enough",
            PrimaryBecause::ReplicasBehind => "no replica is known to have replayed far enough",
            PrimaryBecause::WaitedInVain => "no replica had replayed far enough within replica_wait_max",
            PrimaryBecause::ReplicaAnsweredBehind => "the replica had not replayed far enough",
            PrimaryBecause::ReplicaFailed => "the replica could not be asked, or failed",
            PrimaryBecause::TooLarge => "the answer is too large to be held back until it is proven fresh",
            PrimaryBecause::Moved => "a write of what it reads began while the replica was answering",
        })
    }
}

/// Chooses the server for a read whose words look like `seen`: of the replicas that may be fresh enough one in this proxy's zone, if
/// there is any; of those the least busy; of equally busy ones the first from `turn` on.
pub fn choose(bound: ReadBound, seen: &Observation, replicas: &[ReplicaView], turn: usize) -> Choice {
    if !replicas.iter().any(|replica| replica.connected) {
        return Choice::Primary(PrimaryBecause::NoReplica);
    }
    let need = match bound.need(seen) {
        Ok(need) => need,
        Err(because) => return Choice::Primary(because),
    };
    let count = replicas.len();
    let in_turn = (0..count).map(|step| (turn % count + step) % count);
    let candidates = in_turn.filter(|index| {
        let replica = &replicas[*index];
        let covers = replica_answer_ok(need, replica.last_known_replay);
        replica.connected && (covers || replica.may_have_moved && need != UNPLACED)
    });
    // One that is known to cover it is surer than one that may.
    let best = candidates.min_by_key(|index| {
        let replica = &replicas[*index];
        (!replica_answer_ok(need, replica.last_known_replay), !replica.is_near, replica.outstanding)
    });
    match best {
        Some(index) => Choice::Replica(index, need),
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
        ReplicaView {
            connected: true,
            is_near: true,
            outstanding,
            last_known_replay: Lsn(replay),
            may_have_moved: false,
        }
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
        let ask = |replicas: &[ReplicaView], turn| choose(ReadBound::Strict, &seen, replicas, turn);
        assert_eq!(ask(&replicas, 0), Choice::Replica(2, Lsn(1000)));
        let gone = replicas.map(|one| ReplicaView { connected: one.last_known_replay != Lsn(5000), ..one });
        assert_eq!(ask(&gone, 0), Choice::Replica(0, Lsn(1000)));
        // One that may have caught up is tried only where none is known to have.
        let stale = [replica(1000, 9), ReplicaView { may_have_moved: true, ..replica(5, 0) }];
        assert_eq!(ask(&stale, 1), Choice::Replica(0, Lsn(1000)));
        assert_eq!(ask(&stale[1..], 1), Choice::Replica(0, Lsn(1000)));
        // The zone goes before how busy it is; another zone goes before the primary.
        let far = |one: ReplicaView| ReplicaView { is_near: false, ..one };
        assert_eq!(ask(&[far(replica(5000, 0)), replica(5000, 9)], 0), Choice::Replica(1, Lsn(1000)));
        assert_eq!(ask(&[far(replica(5000, 4)), far(replica(5000, 3))], 0), Choice::Replica(1, Lsn(1000)));
        assert_eq!(ask(&[far(replica(5000, 4)), replica(999, 0)], 0), Choice::Replica(0, Lsn(1000)));
        // Equally busy ones take turns.
        let equal = [replica(5000, 1); 3];
        assert_eq!([0, 1, 2, 3].map(|turn| ask(&equal, turn)), [0, 1, 2, 0].map(|at| Choice::Replica(at, Lsn(1000))));
    }

    #[test]
    fn the_primary_is_asked_with_a_reason() {
        use PrimaryBecause::*;
        let seen = written_at(1000);
        let primary = |bound, replicas: &[ReplicaView]| match choose(bound, &seen, replicas, 0) {
            Choice::Primary(because) => because,
            Choice::Replica(..) => panic!("a replica"),
        };
        assert_eq!(primary(ReadBound::Strict, &[]), NoReplica);
        let gone = [ReplicaView { connected: false, ..replica(9000, 0) }];
        assert_eq!(primary(ReadBound::Any, &gone), NoReplica);
        assert_eq!(primary(ReadBound::Strict, &[replica(999, 0)]), ReplicasBehind);
        assert_eq!(primary(ReadBound::Session(SessionMark::Unknown), &[replica(9000, 0)]), OwnWriteUnknown);
        assert_eq!(primary(ReadBound::Session(SessionMark::At(Lsn(1001))), &[replica(1000, 0)]), ReplicasBehind);
        assert_eq!(primary(ReadBound::Lag(None), &[replica(9000, 0)]), LagUnknown);
        // A write without a position is covered by nobody, however old the news of a replica.
        let unplaced = ReplicaView { may_have_moved: true, ..replica(9000, 0) };
        assert_eq!(primary(ReadBound::Session(SessionMark::At(UNPLACED)), &[unplaced]), ReplicasBehind);

        let words = Words::new();
        let set = WordSet::from_indexes([5]);
        let _open = words.begin_write(&set).expect("room");
        let seen = words.observe(&set);
        let ask = |bound| choose(bound, &seen, &[replica(9000, 0)], 0);
        assert_eq!(ask(ReadBound::Strict), Choice::Primary(WritePending));
        assert_eq!(ask(ReadBound::Any), Choice::Replica(0, Lsn(0)));
        let labels: std::collections::BTreeSet<_> = PrimaryBecause::ALL.iter().map(|one| one.as_str()).collect();
        assert_eq!(labels.len(), PrimaryBecause::ALL.len());
        assert!(PrimaryBecause::ALL.iter().enumerate().all(|(index, one)| *one as usize == index));
    }

    #[test]
    fn looser_levels_ask_for_what_they_promise() {
        let seen = written_at(1000);
        let ask = |bound, replay| choose(bound, &seen, &[replica(replay, 0)], 0);
        assert_eq!(ask(ReadBound::Session(SessionMark::Nothing), 0), Choice::Replica(0, Lsn(0)));
        assert_eq!(ask(ReadBound::Session(SessionMark::At(Lsn(70))), 70), Choice::Replica(0, Lsn(70)));
        assert_eq!(ask(ReadBound::Lag(Some(Lsn(70))), 70), Choice::Replica(0, Lsn(70)));
        assert_eq!(ask(ReadBound::Lag(Some(Lsn(71))), 70), Choice::Primary(PrimaryBecause::ReplicasBehind));
        assert!(ReadBound::Strict.must_be_unmoved() && !ReadBound::Session(SessionMark::Nothing).must_be_unmoved());
    }

    #[test]
    fn levels_are_spelled_in_one_way() {
        let known = [Level::Strict, Level::Session, Level::Any, Level::Lag(1), Level::Lag(500), Level::Lag(LAG_MS_MAX)];
        for level in known {
            assert_eq!(Level::parse(&level.to_string()), Some(level));
            assert_eq!(Level::unpacked(level.packed()), level);
        }
        assert_eq!(Level::parse("lag<=2s"), Some(Level::Lag(2000)));
        assert_eq!(Level::parse(" lag <= 2 min "), Some(Level::Lag(120_000)));
        for wrong in ["", "lag", "lag < 5ms", "lag <= 5", "lag <= 0ms", "lag <= 61min", "lag <= 99999999999s", "Strict"]
        {
            assert_eq!(Level::parse(wrong), None, "{wrong}");
        }
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
