//! Feeding the sketch of hot keys: one statement in sixteen of each session, counted sixteenfold.
//!
//! What is not sampled costs a load and a store of the session's own. Keys are shown as text where a sampled statement told
//! them; their values are for admins only (`crate::console`). Non-goal: the counting itself (`weir_core::hot`).

use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use smallvec::SmallVec;
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::hot::{Hot, Sketch, Subject, Use};
use weir_core::plan::{Plan, RouteReason};
use weir_core::sql::normal::Literal;
use weir_wire::frontend::Bind;

/// One statement in so many is counted.
pub const SAMPLE: u32 = 16;
/// Keys counted per database: about 40 KiB.
const PLACES: usize = 256;
/// What is kept of a key's text.
pub const TEXT_BYTES_MAX: usize = 64;
/// Keys of one statement that are counted.
const KEYS_MAX: usize = 4;

pub struct HotKeys {
    sketch: Mutex<Sketch>,
    start: Instant,
}

impl Default for HotKeys {
    fn default() -> Self {
        HotKeys { sketch: Mutex::new(Sketch::new(PLACES)), start: Instant::now() }
    }
}

/// Where the value of a statement's key can be read.
#[derive(Clone, Copy)]
pub enum Given<'a> {
    Bind(&'a Bytes),
    Literals(&'a str, &'a [Literal]),
    Unknown,
}

impl HotKeys {
    /// Counts one sampled statement.
    pub fn record(&self, plan: &Plan, used: Use, values: Given<'_>) {
        let touched = if used == Use::Write { &plan.writes } else { &plan.reads };
        let subjects = subjects(touched);
        if subjects.is_empty() {
            return;
        }
        let text = if subjects.len() == 1 { key_text(plan, values) } else { None };
        let now_ms = self.now_ms();
        let mut sketch = self.sketch.lock();
        for subject in subjects {
            let text = text.as_deref().filter(|_| subject.key.is_some());
            sketch.record(subject, (used, u64::from(SAMPLE)), now_ms, || text.map(Into::into));
        }
    }

    /// The hottest first, and all that was counted.
    pub fn hottest(&self, most: usize) -> (Vec<Hot>, u64) {
        self.sketch.lock().hottest(self.now_ms(), most)
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

/// The keys that a statement names, else its tables.
fn subjects(touched: &Dependencies) -> SmallVec<[Subject; KEYS_MAX]> {
    let keyed = touched.iter().filter_map(|one| match one {
        Dependency::Key(table, key) => Some(Subject { table: *table, key: Some(*key) }),
        _ => None,
    });
    let keys: SmallVec<[Subject; KEYS_MAX]> = keyed.take(KEYS_MAX).collect();
    if !keys.is_empty() {
        return keys;
    }
    let tables = touched.iter().filter_map(|one| match one {
        Dependency::Table(table) => Some(Subject { table: *table, key: None }),
        _ => None,
    });
    tables.take(KEYS_MAX).collect()
}

/// The key's value as people write it, if the statement has one and it can be read.
fn key_text(plan: &Plan, values: Given<'_>) -> Option<String> {
    let RouteReason::Key { name, .. } = &plan.reason else { return None };
    let text = match (name.value.strip_prefix('$'), name.value.strip_prefix("literal "), values) {
        (Some(number), _, Given::Bind(bind)) => {
            let bind = Bind::read(bind).ok()?;
            let (binary, value) = bind.values().nth(number.parse::<usize>().ok()?.checked_sub(1)?)?;
            shown(binary, value?)?
        }
        (_, Some(number), Given::Literals(sql, literals)) => {
            let literal = literals.get(number.parse::<usize>().ok()?.checked_sub(1)?)?;
            sql.get(literal.start as usize..literal.end as usize)?.to_owned()
        }
        (None, None, _) => name.value.to_string(),
        _ => return None,
    };
    Some(text.chars().take(TEXT_BYTES_MAX).collect())
}

/// A parameter's value. Binary ones do not say what they are: printable bytes are text, and others an integer of their length.
/// `None` where it could be either: such a key is told by its hash.
fn shown(binary: bool, value: &[u8]) -> Option<String> {
    let printable = value.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ' || !byte.is_ascii());
    let text = std::str::from_utf8(value).ok().filter(|_| !binary || printable).map(str::to_owned);
    match value.len() {
        2 | 4 if binary && text.is_some() => None,
        _ if text.is_some() => text,
        2 => value.try_into().ok().map(|bytes| i16::from_be_bytes(bytes).to_string()),
        4 => value.try_into().ok().map(|bytes| i32::from_be_bytes(bytes).to_string()),
        8 => value.try_into().ok().map(|bytes| i64::from_be_bytes(bytes).to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_only_as_what_they_can_be() {
        let text = |binary, value: &[u8]| shown(binary, value);
        assert_eq!(text(false, b"42").as_deref(), Some("42"));
        assert_eq!(text(true, &42_i64.to_be_bytes()).as_deref(), Some("42"));
        assert_eq!(text(true, &(-7_i32).to_be_bytes()).as_deref(), Some("-7"));
        assert_eq!(text(true, b"ann@example").as_deref(), Some("ann@example"));
        assert_eq!(text(true, b"12345678").as_deref(), Some("12345678"));
        assert_eq!(text(true, b"anna"), None, "or the number 1634627169");
        assert_eq!(text(true, &[0x80; 16]), None, "a uuid");
    }
}
