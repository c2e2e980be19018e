//! loom's atomics under the names of weir-core's `fresh::sync`, and what a [`Mutant`] does to them: the words know nothing of it.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use loom::sync::atomic::AtomicU64 as Atomic;
pub use loom::sync::atomic::Ordering;

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    None,
    /// Fences do nothing.
    NoFence,
    /// Every access is relaxed, and fences do nothing.
    Relaxed,
    /// The state word moves before the LSN is stored.
    StateBeforeLsn,
    /// Stamps are taken over whatever has happened meanwhile.
    BlindStamp,
    /// Raising leaves `pending` as it is.
    NothingPending,
    /// Lowering does not wait for the write to be visible. (The players do that, not the atomics.)
    EarlyEnd,
}

/// Of the state word: what raising and lowering add.
const RAISED: u64 = (1 << 16) + 1;
const LOWERED: u64 = (1 << 16) - 1;

std::thread_local! {
    /// A run of loom plays all its threads on one.
    static MUTANT: Cell<Mutant> = const { Cell::new(Mutant::None) };
}

loom::thread_local! {
    /// [`Mutant::StateBeforeLsn`]: an LSN that is still to be stored.
    static LATE: RefCell<Option<(Arc<Atomic>, u64)>> = RefCell::new(None);
}

/// For all runs on this thread from now on.
pub fn break_by(mutant: Mutant) {
    MUTANT.set(mutant);
}

pub fn mutant_is(mutant: Mutant) -> bool {
    MUTANT.get() == mutant
}

fn weakened(order: Ordering) -> Ordering {
    if mutant_is(Mutant::Relaxed) { Ordering::Relaxed } else { order }
}

pub fn fence(order: Ordering) {
    if !mutant_is(Mutant::NoFence) && !mutant_is(Mutant::Relaxed) {
        loom::sync::atomic::fence(order);
    }
}

#[derive(Debug)]
pub struct AtomicU64(Arc<Atomic>);

impl AtomicU64 {
    pub fn new(value: u64) -> Self {
        AtomicU64(Arc::new(Atomic::new(value)))
    }

    pub fn load(&self, order: Ordering) -> u64 {
        self.0.load(weakened(order))
    }

    pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        let unraised = mutant_is(Mutant::NothingPending) && value == LOWERED;
        let before = self.0.fetch_add(if unraised { LOWERED + 1 } else { value }, weakened(order));
        if value == LOWERED
            && let Some((lsn, value)) = LATE.with(|late| late.borrow_mut().take())
        {
            lsn.fetch_max(value, Ordering::Relaxed);
        }
        before
    }

    pub fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
        if mutant_is(Mutant::StateBeforeLsn) {
            LATE.with(|late| *late.borrow_mut() = Some((Arc::clone(&self.0), value)));
            return 0;
        }
        self.0.fetch_max(value, weakened(order))
    }

    /// Errors: as of the standard library's.
    pub fn fetch_update(
        &self,
        set: Ordering,
        fetch: Ordering,
        change: impl Fn(u64) -> Option<u64>,
    ) -> Result<u64, u64> {
        let change = |state| {
            let next = change(state)?;
            let raised = mutant_is(Mutant::NothingPending) && next.wrapping_sub(state) == RAISED;
            Some(if raised { next - 1 } else { next })
        };
        self.0.fetch_update(weakened(set), weakened(fetch), change)
    }

    /// Errors: as of the standard library's.
    pub fn compare_exchange(&self, is: u64, new: u64, set: Ordering, fetch: Ordering) -> Result<u64, u64> {
        if mutant_is(Mutant::BlindStamp) {
            return Ok(self.0.swap(new, weakened(set)));
        }
        self.0.compare_exchange(is, new, weakened(set), weakened(fetch))
    }
}
