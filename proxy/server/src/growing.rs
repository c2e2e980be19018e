//! A list that only grows, read by everybody without a lock: shards that join are appended while sessions run.
//!
//! Invariant: what has been pushed stays where it is, at the same index, for the life of the list; whoever sees a length sees everything
//! below it. What was there from the start costs a reader one look at a slice. Non-goals: removing, and growing without bound.

use std::ops::Index;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Release};

use parking_lot::Mutex;
use weir_core::id::ShardId;

use crate::hub::SHARDS_MAX;

/// At most [`SHARDS_MAX`] beyond what it began with.
pub struct Growing<T> {
    first: Box<[T]>,
    /// Room for the others; most lists never need it.
    later: OnceLock<Box<[OnceLock<T>]>>,
    pushed: AtomicUsize,
    pushing: Mutex<()>,
}

impl<T> Growing<T> {
    /// Its place. `None`: there is no room left, and it was not taken.
    pub fn push(&self, value: T) -> Option<usize> {
        let _one_at_a_time = self.pushing.lock();
        let later = self.later.get_or_init(|| (0..SHARDS_MAX).map(|_| OnceLock::new()).collect());
        let pushed = self.pushed.load(Acquire);
        later.get(pushed)?.set(value).ok()?;
        self.pushed.store(pushed + 1, Release);
        Some(self.first.len() + pushed)
    }

    pub fn get(&self, index: usize) -> Option<&T> {
        match self.first.get(index) {
            Some(found) => Some(found),
            None => self.later.get()?.get(index - self.first.len())?.get(),
        }
    }

    pub fn len(&self) -> usize {
        self.first.len() + self.pushed.load(Acquire)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those that there are now.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// The same with the numbers of shards.
    pub fn by_shard(&self) -> impl Iterator<Item = (ShardId, &T)> {
        self.iter().enumerate().map(|(number, value)| (ShardId(number as u16), value))
    }
}

impl<T> Index<ShardId> for Growing<T> {
    type Output = T;

    /// Who has a shard's number has seen it in a topology, and that comes after the shard itself.
    fn index(&self, shard: ShardId) -> &T {
        match self.get(usize::from(shard.0)) {
            Some(found) => found,
            None => panic!("shard {shard} is in a topology and not in a list of {}", self.len()),
        }
    }
}

impl<T> FromIterator<T> for Growing<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Growing {
            first: values.into_iter().collect(),
            later: OnceLock::new(),
            pushed: AtomicUsize::new(0),
            pushing: Mutex::new(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_stays_where_it_is() {
        let list: Growing<String> = ["a", "b"].map(str::to_owned).into_iter().collect();
        let b = &list[ShardId(1)];
        assert_eq!((list.len(), list.get(2)), (2, None));
        for number in 0..SHARDS_MAX {
            assert_eq!(list.push(number.to_string()), Some(number + 2));
        }
        assert_eq!(list.push("one too many".to_owned()), None);
        assert_eq!((&**b, &*list[ShardId(2)], list.len()), ("b", "0", SHARDS_MAX + 2));
        assert_eq!(list.iter().next_back().map(String::as_str), Some(&*(SHARDS_MAX - 1).to_string()));
        assert_eq!(list.by_shard().nth(3).map(|(shard, _)| shard), Some(ShardId(3)));
    }

    #[test]
    fn readers_see_all_below_the_length() {
        let list: Growing<usize> = std::iter::empty().collect();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..SHARDS_MAX).for_each(|number| assert_eq!(list.push(number), Some(number))));
            for _ in 0..2 {
                scope.spawn(|| {
                    while list.len() < SHARDS_MAX {
                        let length = list.len();
                        assert_eq!(
                            list.iter().take(length).copied().collect::<Vec<_>>(),
                            (0..length).collect::<Vec<_>>()
                        );
                    }
                });
            }
        });
    }
}
