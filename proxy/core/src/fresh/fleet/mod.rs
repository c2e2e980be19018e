//! Several proxies at one shard: who takes part, who is told of which writes, and who may serve.
//!
//! A *member* is one proxy at one shard, by a row on the shard's primary. [`Roster`] is what it makes of the other rows, [`Told`] whom
//! it tells of its own writes, [`Heard`] what others have told it, and [`Term`] how long that holds. What is asked and sent is the
//! server's; the model in this directory plays these very values against each other.
//!
//! Invariant: a write is sent to the server only after every other member that may serve has it among the writes under way, or
//! serves no more; and it stays there until its end was heard, or its server process is gone.
//!
//! Times are microseconds on a member's own clock, which neither runs backwards nor stops. Non-goals: sockets, SQL, patience.

pub mod heard;
#[cfg(test)]
mod model;
pub mod roster;
mod silence;
pub mod told;

pub use heard::{Attach, Heard, Unheard};
pub use roster::{Burial, Process, Roster, Row, Tie};
pub use told::{Told, UnderWay};

use super::words::Words;

/// Clocks of two machines may differ in speed by so much (a hundredth), and timers fire late.
const DRIFT: u64 = 100;
const SLACK_US: u64 = 20_000;

/// How proxies hear of each other's writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hearing {
    /// A write waits until all have heard of it.
    Leased,
    /// It does not wait; who serves asks the others how far they have come.
    Pushed,
}

/// How far a proxy has come at a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Standing {
    /// It is not in the table, or does not know whether it is: it neither serves nor writes.
    Out,
    /// It has left for good.
    Left,
    /// Everybody else who may serve hears of its writes. Whether it hears of all of theirs is not known yet.
    Writes,
    /// It hears of all writes and may answer from its cache and from replicas.
    Serves,
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Out => "out",
            Standing::Left => "left",
            Standing::Writes => "joining",
            Standing::Serves => "serving",
        }
    }
}

/// For how long a member may count on what it knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Term {
    pub leased_until_us: u64,
    /// As long as others are heard, where they push; else for ever.
    pub hears_until_us: u64,
}

impl Term {
    /// A lease runs from the moment when the primary was asked, however late it answers.
    pub fn lease_until(asked_us: u64, lease_us: u64) -> u64 {
        asked_us + lease_us
    }

    pub fn served_until_us(self) -> u64 {
        self.leased_until_us.min(self.hears_until_us)
    }

    /// May reads be answered from the cache or by replicas? Ask after the words were looked at.
    pub fn may_serve(self, serves: bool, now_us: u64) -> bool {
        serves && now_us < self.served_until_us()
    }

    pub fn may_write(self, standing: Standing, now_us: u64) -> bool {
        standing >= Standing::Writes && now_us < self.leased_until_us
    }

    /// May a write be sent to the server? `deaf`: whether somebody who was to be told has not heard.
    pub fn may_forward(self, deaf: bool, standing: Standing, now_us: u64) -> bool {
        !deaf && self.may_write(standing, now_us)
    }
}

/// From so long after its row says that it is out, a member serves nothing for sure.
fn fence_us(lease_us: u64) -> u64 {
    lease_us + lease_us / DRIFT + SLACK_US
}

/// Whose stamps a member takes over: those of the member with the lowest number. `others`: number, and whether it is out.
pub fn lender(own: u64, others: impl IntoIterator<Item = (u64, bool)>) -> Option<u64> {
    let lowest = others.into_iter().filter(|(_, out)| !out).map(|(id, _)| id).min();
    lowest.filter(|lowest| *lowest < own)
}

/// What a member lends of words from `first` on; 0 stands for a word that is not settled.
pub fn lend(words: &Words, first: u16, count: u16) -> Vec<u64> {
    words.settled_stamps(first, count).into_iter().map(|settled| settled.map_or(0, |(_, stamp)| stamp)).collect()
}

/// Takes over `theirs`. `mine`: the same words here, from before the other was asked. Only between members that both serve, before
/// and after: both hear of all writes, so a word that has not moved here and is settled there has seen the same ones.
pub fn borrow(words: &Words, first: u16, mine: &[Option<(u64, u64)>], theirs: &[u64]) {
    for (step, (mine, theirs)) in mine.iter().zip(theirs).enumerate() {
        if let Some(mine) = mine.filter(|mine| *theirs != 0 && mine.1 != *theirs) {
            words.take_stamp(first.wrapping_add(step as u16), mine, *theirs);
        }
    }
}
