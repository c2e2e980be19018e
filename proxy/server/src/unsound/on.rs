//! What builds with the feature `unsound` do at its hooks. Read once: `WEIR_UNSOUND`, `WEIR_FAILPOINT`, `WEIR_LINGER`.
//!
//! Invariant: without those variables such a build does what any other does. Non-goal: speed.

use std::pin::Pin;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use weir_core::fresh::{Intent, WordSet, Words, WordsFull};
use weir_core::id::Lsn;

use super::{Place, Variant};

/// One time in so many the process lingers at a step.
const LINGERS_ONE_IN: u32 = 8;
/// Every step.
const ANYWHERE: &str = "anywhere";
/// A statement that was sent takes about so long.
const SOON: Duration = Duration::from_millis(3);

static CHOSEN: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("WEIR_UNSOUND").ok());
static FAILPOINT: LazyLock<Option<(String, u64)>> = LazyLock::new(|| step_and_number("WEIR_FAILPOINT"));
static LINGER: LazyLock<Option<(String, u64)>> = LazyLock::new(|| step_and_number("WEIR_LINGER"));
static REACHED: AtomicU64 = AtomicU64::new(0);
/// Words that nobody looks at.
static NOWHERE: LazyLock<Words> = LazyLock::new(Words::new);

/// `told:50` in the environment.
fn step_and_number(variable: &str) -> Option<(String, u64)> {
    let said = std::env::var(variable).ok()?;
    let (step, number) = said.split_once(':')?;
    Some((step.to_owned(), number.parse().ok()?))
}

pub fn is(variant: Variant) -> bool {
    CHOSEN.as_ref().is_some_and(|chosen| *chosen == snake(&format!("{variant:?}")))
}

pub fn begin_write(words: &Words, set: &WordSet) -> Result<Intent, WordsFull> {
    if is(Variant::NoPending) {
        words.end_write(words.begin_write(set)?, None);
    } else if !is(Variant::IntentAfterWrite) {
        return words.begin_write(set);
    }
    NOWHERE.begin_write(set)
}

pub fn end_write(words: &Words, intent: Intent, lsn: Option<Lsn>) {
    let unseen = is(Variant::NoPending) || is(Variant::IntentAfterWrite);
    if unseen && let Ok(late) = words.begin_write(intent.words()) {
        NOWHERE.end_write(intent, None);
        words.end_write(late, lsn);
    } else {
        words.end_write(intent, lsn);
    }
}

pub fn reach(step: Place) {
    if is_last(step) {
        die();
    }
}

pub fn reach_soon(step: Place) {
    if is_last(step) {
        tokio::spawn(async {
            tokio::time::sleep(SOON.mul_f64(rand::random())).await;
            die();
        });
    }
}

pub fn linger(step: Place) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    reach(step);
    let lingers = rand::random_range(0..LINGERS_ONE_IN) == 0;
    let longest = LINGER.as_ref().filter(|(at, _)| lingers && (at == ANYWHERE || *at == name(step)));
    let longest = longest.map_or(0, |(_, ms)| *ms);
    Box::pin(async move {
        if longest > 0 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(1..=longest))).await;
        }
    })
}

/// What such a build says of itself when it starts.
pub fn warn() {
    tracing::warn!(unsound = ?*CHOSEN, failpoint = ?*FAILPOINT, linger = ?*LINGER, "this build may be broken on purpose");
}

fn is_last(step: Place) -> bool {
    let Some((at, nth)) = &*FAILPOINT else { return false };
    *at == name(step) && REACHED.fetch_add(1, Relaxed) + 1 == *nth
}

/// As `kill -9` from outside.
fn die() {
    if kill_process(getpid(), Signal::KILL).is_err() {
        std::process::abort();
    }
}

fn name(step: Place) -> String {
    snake(&format!("{step:?}"))
}

/// `NoPending` is `no_pending`.
fn snake(name: &str) -> String {
    let mut snake = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}
