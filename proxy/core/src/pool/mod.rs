//! Who gets a Backend: idle ones, permission to open one, or a place in the queue.
//!
//! Invariant: `leased + idle + opening <= size + reserve` always, and beyond `size` only for who has waited for the reserve;
//! waiters are served strictly first come, first served; a returned Backend goes to the first waiter before anybody else
//! can take it. Pure: the caller keeps sockets and wakers.

use std::collections::VecDeque;

/// How long a client keeps a Backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Mode {
    /// For a transaction; longer only where state on it demands so.
    #[default]
    Transaction,
    /// Until it leaves.
    Session,
    /// For a statement; transaction blocks are refused.
    Statement,
}

impl Mode {
    /// As the config and the admin console spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Transaction => "transaction",
            Mode::Session => "session",
            Mode::Statement => "statement",
        }
    }
}

/// How many there may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Backends in ordinary times.
    pub size: usize,
    /// More of them, for waiters that ask for the reserve.
    pub reserve: usize,
    pub waiting_max: usize,
}

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
    /// There are more than there should be: close it. It has been counted out already.
    Surplus(T),
}

#[derive(Debug)]
pub struct Shelf<T> {
    bounds: Bounds,
    /// Last in, first out: the warmest connection is used first and surplus ones grow old.
    idle: Vec<T>,
    /// Leased or being opened.
    busy: usize,
    waiting: VecDeque<Ticket>,
    next: u64,
    /// Nobody gets anything; what comes back is closed.
    paused: bool,
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
    pub fn new(bounds: Bounds) -> Self {
        Shelf { bounds, idle: Vec::new(), busy: 0, waiting: VecDeque::new(), next: 0, paused: false }
    }

    pub fn acquire(&mut self) -> Acquire<T> {
        if let Some(idle) = self.take_idle() {
            return Acquire::Idle(idle);
        }
        if self.waiting.is_empty() && !self.paused && self.busy < self.bounds.size {
            self.busy += 1;
            return Acquire::Open;
        }
        if self.waiting.len() >= self.bounds.waiting_max {
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
        if !self.waiting.is_empty() || self.paused {
            return None;
        }
        let idle = self.idle.pop()?;
        self.busy += 1;
        Some(idle)
    }

    /// A leased Backend comes back clean.
    pub fn release(&mut self, backend: T) -> Release<T> {
        if self.paused {
            self.busy = self.busy.saturating_sub(1);
            return Release::Surplus(backend);
        }
        match self.waiting.pop_front() {
            Some(ticket) => Release::HandTo(ticket, backend),
            None => {
                self.busy = self.busy.saturating_sub(1);
                if self.busy + self.idle.len() >= self.bounds.size {
                    return Release::Surplus(backend);
                }
                self.idle.push(backend);
                Release::Shelved
            }
        }
    }

    /// A waiter has waited long enough for the reserve. True: it has left the queue and may open one.
    pub fn draw_reserve(&mut self, ticket: Ticket) -> bool {
        let room = !self.paused && self.busy + self.idle.len() < self.bounds.size + self.bounds.reserve;
        let granted = room && self.forget(ticket);
        self.busy += usize::from(granted);
        granted
    }

    /// Permission to open one ahead of need, while there are fewer than `min`; then report as after [`Acquire::Open`].
    pub fn open_ahead(&mut self, min: usize) -> bool {
        let lacks = !self.paused && self.busy + self.idle.len() < min.min(self.bounds.size);
        self.busy += usize::from(lacks);
        lacks
    }

    /// Other bounds from now on. These waiters may each open one at once; what is too many goes as it comes back.
    #[must_use]
    pub fn resize(&mut self, bounds: Bounds) -> Vec<Ticket> {
        self.bounds = bounds;
        self.call_waiters()
    }

    /// From now on nobody gets anything, until [`Shelf::resume`]. Gives what is idle, to be closed.
    pub fn pause(&mut self) -> Vec<T> {
        self.paused = true;
        std::mem::take(&mut self.idle)
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The end of a pause. These waiters may each open one at once.
    #[must_use]
    pub fn resume(&mut self) -> Vec<Ticket> {
        self.paused = false;
        self.call_waiters()
    }

    fn call_waiters(&mut self) -> Vec<Ticket> {
        let mut called = Vec::new();
        while !self.paused
            && self.busy + self.idle.len() < self.bounds.size
            && let Some(ticket) = self.waiting.pop_front()
        {
            self.busy += 1;
            called.push(ticket);
        }
        called
    }

    /// A leased or opening Backend is gone. `Some`: this waiter may open one in its place.
    #[must_use]
    pub fn closed(&mut self) -> Option<Ticket> {
        if !self.paused
            && self.busy + self.idle.len() <= self.bounds.size
            && let Some(ticket) = self.waiting.pop_front()
        {
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
        Counts { idle: self.idle.len(), busy: self.busy, waiting: self.waiting.len(), size: self.bounds.size }
    }
}

#[cfg(test)]
mod tests;
