//! Who gets a Backend: idle ones, permission to open one, or a place in the queue.
//!
//! Invariant: `leased + idle + opening <= size` always; waiters are served strictly first come, first served; a returned
//! Backend goes to the first waiter before anybody else can take it. Pure: the caller keeps sockets and wakers.

use std::collections::VecDeque;

/// A place in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ticket(u64);

/// Answer to a request for a Backend.
#[derive(Debug, PartialEq, Eq)]
pub enum Acquire<T> {
    /// Here it is.
    Idle(T),
    /// Open a new one, then report [`Shelf::opened`] or [`Shelf::closed`].
    Open,
    /// Wait for this ticket to be called.
    Wait(Ticket),
    /// The queue is full.
    Refused,
}

/// Answer to a return.
#[derive(Debug, PartialEq, Eq)]
pub enum Release<T> {
    /// Hand it to this waiter.
    HandTo(Ticket, T),
    Shelved,
}

#[derive(Debug)]
pub struct Shelf<T> {
    size: usize,
    waiting_max: usize,
    /// Last in, first out: the warmest connection is used first and surplus ones grow old.
    idle: Vec<T>,
    /// Leased or being opened.
    busy: usize,
    waiting: VecDeque<Ticket>,
    next: u64,
}

/// Numbers for SHOW POOLS and metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub idle: usize,
    pub busy: usize,
    pub waiting: usize,
    pub size: usize,
}

impl<T> Shelf<T> {
    /// `size`: Backends at most; `waiting_max`: waiters at most.
    pub fn new(size: usize, waiting_max: usize) -> Self {
        Shelf { size, waiting_max, idle: Vec::new(), busy: 0, waiting: VecDeque::new(), next: 0 }
    }

    pub fn acquire(&mut self) -> Acquire<T> {
        if let Some(idle) = self.take_idle() {
            return Acquire::Idle(idle);
        }
        if self.waiting.is_empty() && self.busy < self.size {
            self.busy += 1;
            return Acquire::Open;
        }
        if self.waiting.len() >= self.waiting_max {
            return Acquire::Refused;
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting.push_back(ticket);
        Acquire::Wait(ticket)
    }

    /// An idle one, if that takes it from nobody: a newcomer never overtakes, so while somebody waits idle ones are
    /// already spoken for.
    pub fn take_idle(&mut self) -> Option<T> {
        if !self.waiting.is_empty() {
            return None;
        }
        let idle = self.idle.pop()?;
        self.busy += 1;
        Some(idle)
    }

    /// A leased Backend comes back clean.
    pub fn release(&mut self, backend: T) -> Release<T> {
        match self.waiting.pop_front() {
            Some(ticket) => Release::HandTo(ticket, backend),
            None => {
                self.busy = self.busy.saturating_sub(1);
                self.idle.push(backend);
                Release::Shelved
            }
        }
    }

    /// A leased or opening Backend is gone. `Some`: this waiter may open one in its place.
    #[must_use]
    pub fn closed(&mut self) -> Option<Ticket> {
        if let Some(ticket) = self.waiting.pop_front() {
            return Some(ticket);
        }
        self.busy = self.busy.saturating_sub(1);
        None
    }

    /// A waiter gave up. False: it was called already and owns what it was handed.
    pub fn forget(&mut self, ticket: Ticket) -> bool {
        match self.waiting.iter().position(|waiting| *waiting == ticket) {
            Some(place) => {
                self.waiting.remove(place);
                true
            }
            None => false,
        }
    }

    /// Takes idle Backends that `stale` picks, oldest first.
    pub fn retire(&mut self, mut stale: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut kept = Vec::with_capacity(self.idle.len());
        let mut retired = Vec::new();
        for idle in self.idle.drain(..) {
            if stale(&idle) { retired.push(idle) } else { kept.push(idle) }
        }
        self.idle = kept;
        retired
    }

    pub fn counts(&self) -> Counts {
        Counts { idle: self.idle.len(), busy: self.busy, waiting: self.waiting.len(), size: self.size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waiters_are_served_in_order_and_newcomers_do_not_overtake() {
        let mut shelf = Shelf::new(1, 2);
        assert_eq!(shelf.acquire(), Acquire::<u8>::Open);
        let Acquire::Wait(first) = shelf.acquire() else { panic!("no wait") };
        let Acquire::Wait(second) = shelf.acquire() else { panic!("no wait") };
        assert_eq!(shelf.acquire(), Acquire::Refused);
        assert_eq!(shelf.release(7), Release::HandTo(first, 7));
        assert!(!shelf.forget(first), "already called");
        assert_eq!(shelf.closed(), Some(second), "the second opens in its place");
        assert_eq!(shelf.release(8), Release::Shelved);
        assert_eq!(shelf.acquire(), Acquire::Idle(8));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Acquire,
        Release,
        Close,
        GiveUp,
    }

    proptest! {
        #[test]
        fn never_more_than_size_and_nothing_is_lost(steps in prop::collection::vec(prop::sample::select(vec![Step::Acquire, Step::Release, Step::Close, Step::GiveUp]), 0..200)) {
            let mut shelf = Shelf::new(3, 5);
            let (mut held, mut queue, mut made) = (Vec::new(), VecDeque::new(), 0u32);
            for step in steps {
                match step {
                    Step::Acquire => match shelf.acquire() {
                        Acquire::Idle(id) => held.push(id),
                        Acquire::Open => { held.push(made); made += 1; }
                        Acquire::Wait(ticket) => queue.push_back(ticket),
                        Acquire::Refused => prop_assert_eq!(queue.len(), 5),
                    },
                    Step::Release => if let Some(id) = held.pop()
                        && let Release::HandTo(ticket, id) = shelf.release(id) {
                            prop_assert_eq!(queue.pop_front(), Some(ticket));
                            held.push(id);
                        },
                    Step::Close => if held.pop().is_some() && let Some(ticket) = shelf.closed() {
                        prop_assert_eq!(queue.pop_front(), Some(ticket));
                        held.push(made);
                        made += 1;
                    },
                    Step::GiveUp => if let Some(ticket) = queue.pop_back() { prop_assert!(shelf.forget(ticket)) },
                }
                let counts = shelf.counts();
                prop_assert_eq!(counts.busy, held.len());
                prop_assert_eq!(counts.waiting, queue.len());
                prop_assert!(counts.busy + counts.idle <= 3);
                prop_assert!(queue.is_empty() || counts.idle == 0);
            }
        }
    }
}
