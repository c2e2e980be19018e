//! The order of service, the reserve, and that nothing is lost, in every order of events.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn bounds(size: usize, reserve: usize, waiting_max: usize) -> Bounds {
    Bounds { size, reserve, waiting_max }
}

#[test]
fn waiters_are_served_in_order_and_newcomers_do_not_overtake() {
    let mut shelf = Shelf::new(bounds(1, 0, 2));
    assert_eq!(shelf.acquire(), Acquire::<u8>::Open);
    let Acquire::Wait(first) = shelf.acquire() else { panic!("no wait") };
    let Acquire::Wait(second) = shelf.acquire() else { panic!("no wait") };
    assert_eq!(shelf.acquire(), Acquire::Refused);
    assert_eq!(shelf.release(7), Release::HandTo(first, 7));
    assert!(!shelf.forget(first), "already called");
    assert!(!shelf.draw_reserve(second), "there is none");
    assert_eq!(shelf.closed(), Some(second), "the second opens in its place");
    assert_eq!(shelf.release(8), Release::Shelved);
    assert_eq!(shelf.acquire(), Acquire::Idle(8));
}

#[test]
fn the_reserve_is_for_who_has_waited_and_goes_away_again() {
    let mut shelf = Shelf::new(bounds(1, 1, 9));
    assert_eq!(shelf.acquire(), Acquire::<u8>::Open);
    let Acquire::Wait(first) = shelf.acquire() else { panic!("a newcomer gets no reserve") };
    let Acquire::Wait(second) = shelf.acquire() else { panic!("no wait") };
    assert!(shelf.draw_reserve(first));
    assert!(!shelf.draw_reserve(second), "one is all there is");
    assert!(!shelf.draw_reserve(first), "it has been called already");
    assert_eq!(shelf.release(1), Release::HandTo(second, 1), "with a waiter it stays in use");
    assert_eq!(shelf.release(1), Release::Surplus(1), "one more is in use, and one is what there should be");
    assert_eq!(shelf.release(2), Release::Shelved);
    assert_eq!(shelf.counts(), Counts { idle: 1, busy: 0, waiting: 0, size: 1 });
}

#[test]
fn some_are_opened_ahead_and_sizes_change() {
    let mut shelf = Shelf::<u8>::new(bounds(3, 0, 9));
    assert!(shelf.open_ahead(2) && shelf.open_ahead(2));
    assert!(!shelf.open_ahead(2), "two are enough");
    assert_eq!((shelf.release(1), shelf.release(2)), (Release::Shelved, Release::Shelved));
    assert_eq!(
        (shelf.acquire(), shelf.acquire(), shelf.acquire()),
        (Acquire::Idle(2), Acquire::Idle(1), Acquire::Open)
    );
    let Acquire::Wait(first) = shelf.acquire() else { panic!("no wait") };
    assert_eq!(shelf.resize(bounds(4, 0, 9)), [first], "a larger pool serves who waits");
    let Acquire::Wait(second) = shelf.acquire() else { panic!("no wait") };
    assert_eq!(shelf.resize(bounds(1, 0, 9)), []);
    assert_eq!((shelf.closed(), shelf.closed(), shelf.closed()), (None, None, None), "it shrinks as they close");
    assert_eq!(shelf.release(9), Release::HandTo(second, 9));
    assert_eq!(shelf.release(9), Release::Shelved);
}

#[derive(Clone, Debug)]
enum Step {
    Acquire,
    Release,
    Close,
    GiveUp,
    Reserve,
    Ahead,
    Resize(usize, usize),
    Pause,
    Resume,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Acquire),
        4 => Just(Step::Release),
        2 => Just(Step::Close),
        1 => Just(Step::GiveUp),
        2 => Just(Step::Reserve),
        1 => Just(Step::Ahead),
        1 => Just(Step::Pause),
        2 => Just(Step::Resume),
        1 => (1usize..5, 0usize..3).prop_map(|(size, reserve)| Step::Resize(size, reserve)),
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    #[test]
    fn never_too_many_and_nothing_is_lost(steps in steps()) {
        let mut limits = bounds(3, 2, 5);
        let mut shelf = Shelf::new(limits);
        let (mut held, mut queue, mut made, mut peak) = (Vec::new(), VecDeque::new(), 0u32, 0);
        for step in steps {
            let before = shelf.counts();
            let total_before = before.busy + before.idle;
            match step {
                Step::Acquire => match shelf.acquire() {
                    Acquire::Idle(id) => held.push(id),
                    Acquire::Open => {
                        prop_assert!(total_before < limits.size, "the reserve is not for newcomers");
                        held.push(made);
                        made += 1;
                    }
                    Acquire::Wait(ticket) => queue.push_back(ticket),
                    Acquire::Refused => prop_assert_eq!(queue.len(), 5),
                },
                Step::Release => if let Some(id) = held.pop() {
                    match shelf.release(id) {
                        Release::HandTo(ticket, id) => {
                            prop_assert_eq!(queue.pop_front(), Some(ticket));
                            held.push(id);
                        }
                        Release::Shelved => prop_assert!(queue.is_empty()),
                        Release::Surplus(_) => {
                            prop_assert!(shelf.is_paused() || queue.is_empty() && total_before > limits.size);
                        }
                    }
                },
                Step::Close => if held.pop().is_some() && let Some(ticket) = shelf.closed() {
                    prop_assert_eq!(queue.pop_front(), Some(ticket));
                    held.push(made);
                    made += 1;
                },
                Step::GiveUp => if let Some(ticket) = queue.pop_back() { prop_assert!(shelf.forget(ticket)) },
                Step::Reserve => if let Some(ticket) = queue.front().copied() && shelf.draw_reserve(ticket) {
                    queue.pop_front();
                    held.push(made);
                    made += 1;
                },
                Step::Ahead => if shelf.open_ahead(2) {
                    prop_assert!(total_before < 2);
                    held.push(made);
                    made += 1;
                },
                Step::Pause => drop(shelf.pause()),
                Step::Resume | Step::Resize(..) => {
                    let called = if let Step::Resize(size, reserve) = step {
                        limits = bounds(size, reserve, 5);
                        shelf.resize(limits)
                    } else {
                        shelf.resume()
                    };
                    for ticket in called {
                        prop_assert_eq!(queue.pop_front(), Some(ticket));
                        held.push(made);
                        made += 1;
                    }
                }
            }
            let counts = shelf.counts();
            prop_assert_eq!(counts.busy, held.len());
            prop_assert_eq!(counts.waiting, queue.len());
            // A pool that was made smaller only ever shrinks towards its bounds.
            let total = counts.busy + counts.idle;
            prop_assert!(total <= (limits.size + limits.reserve).max(total_before));
            prop_assert!(queue.is_empty() || counts.idle == 0, "nobody waits while one is idle");
            prop_assert!(queue.is_empty() || shelf.is_paused() || total >= limits.size, "nobody waits in vain");
            prop_assert!(!shelf.is_paused() || total <= total_before, "a pause only ever drains");
            peak = peak.max(total);
        }
        prop_assert!(peak <= 7);
    }
}
