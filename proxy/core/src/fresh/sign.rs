//! Which weirs are in front of a server, by the signs they have raised there: may this one trust that it hears of every write?
//!
//! A sign is a shared advisory lock that a weir holds on each primary for as long as its LSN clock is connected. Its two keys say who
//! raised it; the server shows all of them, of every database, in `pg_locks`. Whoever raises one does so *before* it writes, and looks
//! *afterwards*: of two weirs at least one sees the other.
//!
//! Non-goals: holding locks, and what is done about company.

/// The upper half of the first key; applications' own advisory locks should not begin like this.
const MARK: u32 = 0x5EE1;
const FLEET_BITS: u32 = 15;

/// What a weir says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sign {
    pub scope: Scope,
    /// Names those who tell each other of their writes.
    pub fleet: Option<FleetName>,
    /// Names the process.
    pub process: u32,
}

/// What it writes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// The database in which its sign is raised.
    Database,
    /// Any database of the server, except for those that the same process names apart.
    Server,
}

/// Weirs with the same name hear of each other's writes. Never 0, and of 15 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FleetName(u16);

/// A sign as the server shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raised {
    /// On the connection that asks.
    pub is_own: bool,
    /// OID of the database in which it is raised.
    pub database: u32,
    pub sign: Sign,
}

/// Who else writes, and is not heard of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Company {
    /// Another weir, with which no peers are shared.
    Another,
    /// Two entries of this weir lead to one database, each with words of its own.
    Twice,
    /// The server does not show this weir's own sign, so others may not see it either.
    Unseen,
}

impl FleetName {
    /// From a digest of what all of them know.
    pub fn of(digest: u64) -> Self {
        FleetName(((digest % ((1 << FLEET_BITS) - 1)) + 1) as u16)
    }
}

impl Sign {
    /// Of the advisory lock.
    pub fn keys(self) -> (i32, i32) {
        let scope = u32::from(self.scope == Scope::Server) << FLEET_BITS;
        let fleet = self.fleet.map_or(0, |fleet| u32::from(fleet.0));
        ((MARK << 16 | scope | fleet).cast_signed(), self.process.cast_signed())
    }

    /// `None`: it is a lock of somebody else.
    pub fn of_keys(first: u32, second: u32) -> Option<Sign> {
        if first >> 16 != MARK {
            return None;
        }
        let fleet = (first & ((1 << FLEET_BITS) - 1)) as u16;
        let scope = if first >> FLEET_BITS & 1 == 1 { Scope::Server } else { Scope::Database };
        Some(Sign { scope, fleet: (fleet != 0).then_some(FleetName(fleet)), process: second })
    }

    fn hears_of(self, other: Sign) -> bool {
        self.fleet.is_some() && self.fleet == other.fleet
    }
}

impl Raised {
    /// Who `other` is to this one, if it writes in the same database unheard.
    fn company(&self, other: &Raised) -> Option<Company> {
        let anywhere = self.sign.scope == Scope::Server || other.sign.scope == Scope::Server;
        if self.sign.process == other.sign.process {
            // The wildcard entry leaves out what is named.
            return (!anywhere && self.database == other.database).then_some(Company::Twice);
        }
        let meets = anywhere || self.database == other.database;
        (meets && !self.sign.hears_of(other.sign)).then_some(Company::Another)
    }
}

impl std::fmt::Display for Company {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Company::Another => "another weir, which is not one of its [peers], is in front of the same database",
            Company::Twice => "two databases of its configuration are one on the server",
            Company::Unseen => "the server does not show the advisory lock that weir holds there",
        })
    }
}

/// Who writes unheard in the database of the connection that was shown `raised`; `None`: nobody.
pub fn company(raised: &[Raised]) -> Option<Company> {
    let Some(own) = raised.iter().find(|one| one.is_own) else { return Some(Company::Unseen) };
    raised.iter().filter(|one| !one.is_own).find_map(|other| own.company(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Option<u64> = Some(7);
    const B: Option<u64> = Some(8);

    fn raised(is_own: bool, process: u32, database: u32, scope: Scope, fleet: Option<u64>) -> Raised {
        Raised { is_own, database, sign: Sign { scope, fleet: fleet.map(FleetName::of), process } }
    }

    #[test]
    fn keys_say_all_of_it() {
        for (process, fleet) in [(0, None), (u32::MAX, A), (1 << 31, Some(u64::MAX)), (5, Some(0))] {
            for scope in [Scope::Database, Scope::Server] {
                let sign = Sign { scope, fleet: fleet.map(FleetName::of), process };
                let (first, second) = sign.keys();
                assert_eq!(Sign::of_keys(first.cast_unsigned(), second.cast_unsigned()), Some(sign));
            }
        }
        assert_eq!(Sign::of_keys(7, 7), None, "somebody else's lock");
    }

    #[test]
    fn company_is_whoever_writes_unheard() {
        use Scope::{Database as D, Server as S};
        // Own scope and fleet; the other's process (1: this one), database (9: this one), scope, fleet.
        for (scope, fleet, other, expected) in [
            (D, None, (2, 9, D, None), Some(Company::Another)),
            (D, None, (2, 8, D, None), None),
            (D, None, (2, 8, S, None), Some(Company::Another)),
            (S, None, (2, 8, D, None), Some(Company::Another)),
            (S, None, (2, 8, S, None), Some(Company::Another)),
            (D, A, (2, 9, D, A), None),
            (D, A, (2, 8, S, A), None),
            (D, A, (2, 9, D, B), Some(Company::Another)),
            (D, A, (2, 9, D, None), Some(Company::Another)),
            (D, None, (2, 9, D, A), Some(Company::Another)),
            (D, None, (1, 9, D, None), Some(Company::Twice)),
            (D, A, (1, 9, D, A), Some(Company::Twice)),
            (D, None, (1, 8, D, None), None),
            (D, None, (1, 9, S, None), None),
            (S, None, (1, 8, D, None), None),
        ] {
            let (process, database, its_scope, its_fleet) = other;
            let seen = [raised(false, process, database, its_scope, its_fleet), raised(true, 1, 9, scope, fleet)];
            assert_eq!(company(&seen), expected, "{scope:?} {fleet:?} {other:?}");
            let alone = [raised(true, 1, 9, scope, fleet)];
            assert_eq!(company(&alone), None);
        }
        assert_eq!(company(&[raised(false, 2, 8, D, None)]), Some(Company::Unseen));
    }
}
