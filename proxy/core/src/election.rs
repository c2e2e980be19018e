//! Which of a shard's servers is its primary: what they say of themselves, judged. weir never promotes.
//!
//! Invariant: at most one server is the primary, it accepts writes, and it is on the newest timeline that any of them has been
//! seen on, now or earlier; so a primary that was replaced is never taken for one again, however alive it is. Servers of
//! another system (another cluster at a configured address) are no part of the shard. A server is a replica only on the
//! primary's own timeline, because a position says nothing on another.
//!
//! Non-goals: asking the servers, and what follows from an answer. A primary that was replaced but not yet seen to be is still
//! the primary here: fencing it is the work of whoever promotes.

use crate::id::Lsn;

/// What a server said when it was last asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    pub in_recovery: bool,
    /// `system_identifier` of its control file.
    pub system: u64,
    /// Of a standby, the one it receives; else the one it writes.
    pub timeline: u32,
    /// Replay position of a standby, insert position of a primary.
    pub position: Lsn,
    /// When it was started, in microseconds: two addresses with the same are one server.
    pub started: i64,
}

/// What is known of a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Seen {
    /// Not asked yet.
    #[default]
    Unknown,
    /// It did not answer.
    Down,
    Up(Report),
}

/// The primary in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Force {
    /// Its place among the shard's servers; the one that is configured as the primary is the first.
    pub server: usize,
    pub system: u64,
    pub timeline: u32,
}

/// What a server is to its shard.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    Primary,
    Replica,
    /// Not reached.
    Away,
    /// It accepts writes, and another one is the primary, or nobody can tell.
    Superseded,
    /// A standby of another timeline than the primary's.
    OtherTimeline,
    /// Of another system.
    Foreign,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Replica => "replica",
            Role::Away => "away",
            Role::Superseded => "superseded",
            Role::OtherTimeline => "other timeline",
            Role::Foreign => "foreign",
        }
    }
}

/// Why a shard has no primary now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum NoPrimary {
    #[error("not all of its servers have been asked yet")]
    Unasked,
    #[error("none of its servers can be reached")]
    AllDown,
    #[error("the servers that can be reached are of different systems")]
    SeveralSystems,
    #[error("its primary cannot be reached, and no other server accepts writes")]
    Down,
    #[error("no server that can be reached accepts writes")]
    AllInRecovery,
    #[error("the only server that accepts writes is on timeline {found}, which timeline {newest} has replaced")]
    Replaced { found: u32, newest: u32 },
    #[error("a server accepts writes on timeline {timeline} without having been promoted over the primary in force")]
    NotPromoted { timeline: u32 },
    #[error("several servers accept writes on timeline {timeline}")]
    Ambiguous { timeline: u32 },
}

impl NoPrimary {
    /// May the last primary still be one, so that it does no harm to try to reach it? Otherwise it must not be used.
    pub fn may_be_reached(self) -> bool {
        matches!(self, NoPrimary::Down | NoPrimary::AllDown)
    }
}

/// What is known from earlier looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// The last primary.
    pub last: Option<Force>,
    /// The newest timeline that a server of the shard was on.
    pub newest: u32,
}

/// What came of a look at all servers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub primary: Result<Force, NoPrimary>,
    /// For the next look.
    pub newest: u32,
    /// Of each server.
    pub roles: Vec<Role>,
}

/// Judges a shard. `seen`: its servers in the order of the configuration.
pub fn judge(seen: &[Seen], past: Past) -> Verdict {
    let system = system_of(seen, past.last);
    let of_shard = seen.iter().filter_map(up).filter(|report| Ok(report.system) == system);
    let newest = of_shard.map(|report| report.timeline).fold(past.newest, u32::max);
    let primary = system.and_then(|system| elect(seen, (system, newest), past.last));
    // While there is none, replicas are those of the last one: what they hold of it is still its history.
    let known = primary.ok().or(past.last);
    let roles = seen.iter().enumerate().map(|(server, seen)| role(server, seen, primary.ok(), known)).collect();
    Verdict { primary, newest, roles }
}

fn role(server: usize, seen: &Seen, primary: Option<Force>, known: Option<Force>) -> Role {
    let Seen::Up(report) = seen else { return Role::Away };
    match known {
        Some(known) if report.system != known.system => Role::Foreign,
        _ if primary.is_some_and(|primary| primary.server == server) => Role::Primary,
        _ if !report.in_recovery => Role::Superseded,
        Some(known) if report.timeline == known.timeline => Role::Replica,
        _ => Role::OtherTimeline,
    }
}

fn elect(seen: &[Seen], (system, newest): (u64, u32), last: Option<Force>) -> Result<Force, NoPrimary> {
    let up = seen.iter().enumerate().filter_map(|(server, seen)| Some((server, up(seen)?)));
    let writable = || up.clone().filter(|(_, report)| report.system == system && !report.in_recovery);
    let Some(found) = writable().map(|(_, report)| report.timeline).max() else {
        return Err(nobody_writes(seen, last));
    };
    if newest > found {
        return Err(NoPrimary::Replaced { found, newest });
    }
    let on_newest = || writable().filter(|(_, report)| report.timeline == found);
    let stays = last.and_then(|last| on_newest().find(|(server, _)| *server == last.server));
    let Some((server, report)) = stays.or_else(|| on_newest().next()) else {
        return Err(NoPrimary::AllInRecovery);
    };
    let same_server = |other: &Report| other.started == report.started;
    match last {
        // It stays, whoever else claims its timeline.
        Some(_) if stays.is_some() => {}
        _ if on_newest().any(|(_, other)| !same_server(&other)) => {
            return Err(NoPrimary::Ambiguous { timeline: found });
        }
        Some(last) if last.timeline == found && !is_twin(seen, last, &report) => {
            return Err(NoPrimary::NotPromoted { timeline: found });
        }
        _ => {}
    }
    Ok(Force { server, system, timeline: found })
}

fn up(seen: &Seen) -> Option<Report> {
    match seen {
        Seen::Up(report) => Some(*report),
        Seen::Unknown | Seen::Down => None,
    }
}

/// The system that the shard is of: the last primary's. At first it is the configured one's, or the one that all others agree on.
fn system_of(seen: &[Seen], last: Option<Force>) -> Result<u64, NoPrimary> {
    if let Some(last) = last {
        return Ok(last.system);
    }
    if seen.contains(&Seen::Unknown) {
        return Err(NoPrimary::Unasked);
    }
    if let Some(configured) = seen.first().and_then(up) {
        return Ok(configured.system);
    }
    let mut systems = seen.iter().filter_map(|seen| Some(up(seen)?.system));
    let first = systems.next().ok_or(NoPrimary::AllDown)?;
    if systems.all(|other| other == first) { Ok(first) } else { Err(NoPrimary::SeveralSystems) }
}

fn nobody_writes(seen: &[Seen], last: Option<Force>) -> NoPrimary {
    let reached = |server: usize| matches!(seen.get(server), Some(Seen::Up(_)));
    match last {
        _ if !(0..seen.len()).any(reached) => NoPrimary::AllDown,
        Some(last) if !reached(last.server) => NoPrimary::Down,
        _ => NoPrimary::AllInRecovery,
    }
}

/// Is this the last primary under another address?
fn is_twin(seen: &[Seen], last: Force, report: &Report) -> bool {
    seen.get(last.server).and_then(up).is_some_and(|known| known.started == report.started)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u64 = 7;
    const FIRST: Force = Force { server: 0, system: OURS, timeline: 1 };

    fn said(in_recovery: bool, timeline: u32, started: i64) -> Seen {
        Seen::Up(Report { in_recovery, system: OURS, timeline, position: Lsn(100), started })
    }

    /// A server that accepts writes.
    fn writes(timeline: u32, started: i64) -> Seen {
        said(false, timeline, started)
    }

    fn stands_by(timeline: u32) -> Seen {
        said(true, timeline, 0)
    }

    fn foreign(mut seen: Seen) -> Seen {
        if let Seen::Up(report) = &mut seen {
            report.system = OURS + 1;
        }
        seen
    }

    fn at(server: usize, timeline: u32) -> Force {
        Force { server, system: OURS, timeline }
    }

    #[test]
    fn cases() {
        use NoPrimary::*;
        use Role::*;
        use Seen::{Down as Gone, Unknown};
        type Case<'a> = (&'a str, Vec<Seen>, Option<Force>, Result<Force, NoPrimary>, Vec<Role>);
        let cases: Vec<Case<'_>> = vec![
            ("at the start", vec![writes(1, 1), stands_by(1)], None, Ok(at(0, 1)), vec![Primary, Replica]),
            (
                "at the start, one was not asked",
                vec![writes(1, 1), Unknown],
                None,
                Err(Unasked),
                vec![Superseded, Away],
            ),
            (
                "at the start, after a promotion",
                vec![Gone, writes(2, 2), stands_by(2)],
                None,
                Ok(at(1, 2)),
                vec![Away, Primary, Replica],
            ),
            (
                "at the start, only the old one is there",
                vec![writes(1, 1), Gone, stands_by(2)],
                None,
                Err(Replaced { found: 1, newest: 2 }),
                vec![Superseded, Away, OtherTimeline],
            ),
            (
                "at the start, two on one timeline",
                vec![writes(2, 1), writes(2, 2)],
                None,
                Err(Ambiguous { timeline: 2 }),
                vec![Superseded, Superseded],
            ),
            (
                "at the start, one under two addresses",
                vec![writes(2, 5), writes(2, 5)],
                None,
                Ok(at(0, 2)),
                vec![Primary, Superseded],
            ),
            ("at the start, all away", vec![Gone, Gone], None, Err(AllDown), vec![Away, Away]),
            (
                "at the start, two systems",
                vec![Gone, writes(1, 1), foreign(writes(1, 2))],
                None,
                Err(SeveralSystems),
                vec![Away, Superseded, Superseded],
            ),
            (
                "the configured primary says which system it is",
                vec![stands_by(3), foreign(writes(9, 1))],
                None,
                Err(AllInRecovery),
                vec![OtherTimeline, Superseded],
            ),
            (
                "nothing has changed",
                vec![writes(1, 1), stands_by(1)],
                Some(FIRST),
                Ok(at(0, 1)),
                vec![Primary, Replica],
            ),
            ("it was restarted", vec![writes(1, 9), stands_by(1)], Some(FIRST), Ok(at(0, 1)), vec![Primary, Replica]),
            ("the primary died", vec![Gone, stands_by(1)], Some(FIRST), Err(Down), vec![Away, Replica]),
            (
                "another was promoted",
                vec![Gone, writes(2, 2), stands_by(1)],
                Some(FIRST),
                Ok(at(1, 2)),
                vec![Away, Primary, OtherTimeline],
            ),
            (
                "the third one follows",
                vec![Gone, writes(2, 2), stands_by(2)],
                Some(FIRST),
                Ok(at(1, 2)),
                vec![Away, Primary, Replica],
            ),
            (
                "the old one was not stopped",
                vec![writes(1, 1), writes(2, 2)],
                Some(FIRST),
                Ok(at(1, 2)),
                vec![Superseded, Primary],
            ),
            (
                "the old one comes back alone",
                vec![writes(1, 1), Gone],
                Some(at(1, 2)),
                Err(Replaced { found: 1, newest: 2 }),
                vec![Superseded, Away],
            ),
            (
                "the old one comes back as a standby",
                vec![stands_by(2), writes(2, 2)],
                Some(at(1, 2)),
                Ok(at(1, 2)),
                vec![Replica, Primary],
            ),
            (
                "back to the first",
                vec![writes(3, 1), stands_by(3)],
                Some(at(1, 2)),
                Ok(at(0, 3)),
                vec![Primary, Replica],
            ),
            (
                "a standby knows of a promotion first",
                vec![writes(1, 1), Gone, stands_by(2)],
                Some(FIRST),
                Err(Replaced { found: 1, newest: 2 }),
                vec![Superseded, Away, OtherTimeline],
            ),
            (
                "two were promoted",
                vec![Gone, writes(2, 2), writes(2, 3)],
                Some(FIRST),
                Err(Ambiguous { timeline: 2 }),
                vec![Away, Superseded, Superseded],
            ),
            (
                "of two, the newer",
                vec![Gone, writes(2, 2), writes(3, 3)],
                Some(FIRST),
                Ok(at(2, 3)),
                vec![Away, Superseded, Primary],
            ),
            (
                "another claims its timeline",
                vec![writes(1, 1), writes(1, 2)],
                Some(FIRST),
                Ok(at(0, 1)),
                vec![Primary, Superseded],
            ),
            (
                "a copy that was not promoted",
                vec![Gone, writes(1, 2)],
                Some(FIRST),
                Err(NotPromoted { timeline: 1 }),
                vec![Away, Superseded],
            ),
            (
                "its address leads to the promoted one",
                vec![writes(2, 5), writes(2, 5)],
                Some(FIRST),
                Ok(at(0, 2)),
                vec![Primary, Superseded],
            ),
            (
                "another system at an address",
                vec![Gone, foreign(writes(8, 2)), stands_by(1)],
                Some(FIRST),
                Err(Down),
                vec![Away, Foreign, Replica],
            ),
            (
                "the primary's address leads elsewhere",
                vec![foreign(writes(8, 2)), stands_by(1)],
                Some(FIRST),
                Err(AllInRecovery),
                vec![Foreign, Replica],
            ),
            (
                "it was demoted",
                vec![stands_by(1), stands_by(1)],
                Some(FIRST),
                Err(AllInRecovery),
                vec![Replica, Replica],
            ),
            ("all gone", vec![Gone, Gone], Some(FIRST), Err(AllDown), vec![Away, Away]),
        ];
        for (what, seen, last, primary, roles) in cases {
            let newest = last.map_or(0, |last| last.timeline);
            let verdict = judge(&seen, Past { last, newest });
            assert_eq!((verdict.primary, verdict.roles), (primary, roles), "{what}");
        }
    }

    #[test]
    fn a_promotion_that_was_seen_once_is_not_forgotten() {
        let past = Past { last: Some(FIRST), newest: 1 };
        let seen = judge(&[writes(1, 1), stands_by(2)], past);
        assert_eq!((seen.primary, seen.newest), (Err(NoPrimary::Replaced { found: 1, newest: 2 }), 2));
        let later = judge(&[writes(1, 1), Seen::Down], Past { newest: seen.newest, ..past });
        assert_eq!(later.primary, Err(NoPrimary::Replaced { found: 1, newest: 2 }));
        // Another system's timelines are none of ours.
        assert_eq!(judge(&[writes(1, 1), foreign(writes(9, 2))], past).newest, 1);
    }

    /// Whatever three servers say, one after another, the primary's timeline never goes back, and nobody is it on an older one
    /// than somebody was seen on.
    #[test]
    fn never_backwards() {
        let mut choices = vec![Seen::Unknown, Seen::Down, foreign(writes(9, 9))];
        choices.extend((1..=3).flat_map(|timeline| [writes(timeline, 1), writes(timeline, 2), stands_by(timeline)]));
        let lasts = [None, Some(FIRST), Some(at(1, 2))];
        let mut elected = 0;
        for last in lasts {
            for one in &choices {
                for two in &choices {
                    for three in &choices {
                        let seen = [*one, *two, *three];
                        let past = Past { last, newest: last.map_or(0, |last| last.timeline) };
                        let verdict = judge(&seen, past);
                        let primaries = verdict.roles.iter().filter(|role| **role == Role::Primary).count();
                        assert_eq!(primaries, usize::from(verdict.primary.is_ok()), "{seen:?} after {last:?}");
                        let Ok(force) = verdict.primary else { continue };
                        elected += 1;
                        let report = up(&seen[force.server]).expect("it was seen");
                        assert!(
                            !report.in_recovery && report.timeline == force.timeline && report.system == force.system
                        );
                        assert!(last.is_none_or(|last| last.timeline <= force.timeline && last.system == force.system));
                        let newest = seen.iter().filter_map(up).filter(|other| other.system == force.system);
                        assert!(newest.map(|other| other.timeline).max() == Some(force.timeline), "{seen:?}");
                        let moved =
                            last.is_some_and(|last| last.server != force.server && last.timeline == force.timeline);
                        assert!(!moved || up(&seen[last.expect("moved").server]).is_some(), "{seen:?} after {last:?}");
                    }
                }
            }
        }
        assert!(elected > 1000, "{elected}");
    }
}
