//! How much a copy may burden its servers: limits, what was measured, and whether it waits or goes on.
//!
//! Invariant: a limit that cannot be measured holds nobody up. Time comes in as an argument. Non-goals: measuring, and waiting.

use std::fmt;
use std::time::Duration;

/// What a move may do to its servers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes per second of the copy; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// While a replica of source or target is this much behind, in milliseconds, nothing is copied.
    pub lag_ms: Option<u64>,
    /// While so many statements of others run on the source, nothing is copied.
    pub active: Option<u64>,
    /// When the move's slot keeps so many bytes of the source's WAL, the move lets go of it and is paused.
    pub wal: Option<u64>,
}

impl Default for Limits {
    /// Replicas are protected from the first byte on.
    fn default() -> Self {
        Limits { rate: None, lag_ms: Some(10_000), active: None, wal: None }
    }
}

/// A limit and what it is to be; `None`: off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    Rate(Option<u64>),
    Lag(Option<u64>),
    Active(Option<u64>),
    Wal(Option<u64>),
}

impl Limit {
    /// As `name = value` has it: `rate` and `wal` in bytes with a unit (`20MiB`), `lag` as a duration (`10s`), `active` as a number; or `off`.
    pub fn parse(name: &str, value: &str) -> Option<Limit> {
        let off = value.eq_ignore_ascii_case("off");
        let read = |units: &[(&str, u64)]| if off { Some(None) } else { amount(value, units).map(Some) };
        match name.to_ascii_lowercase().as_str() {
            "rate" => read(&SIZES).map(Limit::Rate),
            "lag" => read(&TIMES).map(Limit::Lag),
            "active" => read(&[("", 1)]).map(Limit::Active),
            "wal" => read(&SIZES).map(Limit::Wal),
            _ => None,
        }
    }
}

const SIZES: [(&str, u64); 5] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const TIMES: [(&str, u64); 3] = [("ms", 1), ("s", 1000), ("min", 60_000)];

/// A whole number above 0 with one of the units.
fn amount(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len()));
    let times = units.iter().find(|(name, _)| *name == unit.trim())?.1;
    number.parse::<u64>().ok()?.checked_mul(times).filter(|amount| *amount > 0)
}

impl Limits {
    pub fn set(&mut self, limit: Limit) {
        match limit {
            Limit::Rate(rate) => self.rate = rate,
            Limit::Lag(lag_ms) => self.lag_ms = lag_ms,
            Limit::Active(active) => self.active = active,
            Limit::Wal(wal) => self.wal = wal,
        }
    }

    /// As [`Limits`] is written. Empty: those of the beginning.
    pub fn parse(text: &str) -> Option<Limits> {
        let mut limits = Limits::default();
        for pair in text.split(", ").filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=')?;
            limits.set(Limit::parse(name, value)?);
        }
        Some(limits)
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: u64| {
            let unit = SIZES.iter().rev().find(|(_, times)| bytes.is_multiple_of(*times));
            unit.map_or_else(|| format!("{bytes}B"), |(name, times)| format!("{}{name}", bytes / times))
        };
        let or_off = |text: Option<String>| text.unwrap_or_else(|| "off".to_owned());
        write!(
            f,
            "rate={}, lag={}, active={}, wal={}",
            or_off(self.rate.map(size)),
            or_off(self.lag_ms.map(|lag| format!("{lag}ms"))),
            or_off(self.active.map(|active| active.to_string())),
            or_off(self.wal.map(size)),
        )
    }
}

/// What the servers are at. `None`: not known, or there is nothing to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Measured {
    /// Of the replica that is furthest behind.
    pub lag_ms: Option<u64>,
    pub active: Option<u64>,
    /// WAL that the slot keeps.
    pub wal: Option<u64>,
}

/// Why a move waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// It has been told to.
    Paused,
    Lag,
    Active,
    Rate,
    /// Indexes are made when nobody copies to the shard any more.
    Copies,
}

impl Held {
    pub const ALL: [Held; 5] = [Held::Paused, Held::Lag, Held::Active, Held::Rate, Held::Copies];

    pub fn as_str(self) -> &'static str {
        match self {
            Held::Paused => "paused",
            Held::Lag => "replica lag",
            Held::Active => "active statements",
            Held::Rate => "rate",
            Held::Copies => "copies of other moves",
        }
    }

    pub fn parse(text: &str) -> Option<Held> {
        Held::ALL.into_iter().find(|held| held.as_str() == text)
    }
}

impl Limits {
    /// Does the copy wait until something else is measured? [`Held::Rate`] is what [`Pace`] says.
    pub fn held(&self, measured: &Measured) -> Option<Held> {
        if over(self.lag_ms, measured.lag_ms) {
            return Some(Held::Lag);
        }
        over(self.active, measured.active).then_some(Held::Active)
    }

    /// Is it to let go of the WAL that is kept for it?
    pub fn lets_go(&self, measured: &Measured) -> bool {
        over(self.wal, measured.wal)
    }
}

fn over(limit: Option<u64>, found: Option<u64>) -> bool {
    matches!((limit, found), (Some(limit), Some(found)) if found >= limit)
}

/// So much may be sent at once after a rest.
const BURST: Duration = Duration::from_millis(100);

/// Keeps a rate, whoever sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pace {
    /// When what was sent would have been through at that rate.
    through: Duration,
}

impl Pace {
    /// So many bytes are sent at `now`, counted from any moment. How long to wait before the next.
    pub fn sent(&mut self, (rate, now): (Option<u64>, Duration), bytes: u64) -> Duration {
        let Some(rate) = rate else {
            self.through = now;
            return Duration::ZERO;
        };
        let takes = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.through = self.through.max(now.saturating_sub(BURST)) + takes;
        self.through.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_are_written() {
        let limits = |rate, lag_ms, active, wal| Limits { rate, lag_ms, active, wal };
        for (text, expected, written) in [
            ("", Limits::default(), "rate=off, lag=10000ms, active=off, wal=off"),
            (
                "rate=20MiB, lag=3s, active=8, wal=50GiB",
                limits(Some(20 << 20), Some(3000), Some(8), Some(50 << 30)),
                "rate=20MiB, lag=3000ms, active=8, wal=50GiB",
            ),
            ("rate=1001B, lag=OFF", limits(Some(1001), None, None, None), "rate=1001B, lag=off, active=off, wal=off"),
        ] {
            assert_eq!(Limits::parse(text), Some(expected), "{text}");
            assert_eq!(expected.to_string(), written);
            assert_eq!(Limits::parse(written), Some(expected));
        }
        for wrong in [
            "rate",
            "rate=",
            "rate=5",
            "rate=0B",
            "rate=5s",
            "lag=5MiB",
            "active=-1",
            "speed=5MiB",
            "rate=99999999999TiB",
        ] {
            assert_eq!(Limits::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_was_measured_decides() {
        let limits = Limits { rate: None, lag_ms: Some(1000), active: Some(8), wal: Some(100) };
        let measured = |lag_ms, active, wal| Measured { lag_ms, active, wal };
        for (found, held, lets_go) in [
            (measured(None, None, None), None, false),
            (measured(Some(999), Some(7), Some(99)), None, false),
            (measured(Some(1000), Some(9), None), Some(Held::Lag), false),
            (measured(Some(0), Some(8), Some(100)), Some(Held::Active), true),
        ] {
            assert_eq!((limits.held(&found), limits.lets_go(&found)), (held, lets_go), "{found:?}");
        }
        let off = Limits { lag_ms: None, ..Limits::default() };
        assert_eq!(off.held(&measured(Some(1 << 40), Some(1 << 40), Some(1 << 40))), None);
    }

    #[test]
    fn a_rate_is_kept_and_a_rest_is_not_saved_up() {
        let (mut pace, mut now, mut sent) = (Pace::default(), Duration::from_secs(100), 0);
        while now < Duration::from_secs(110) {
            sent += 1000;
            now += pace.sent((Some(100_000), now), 1000).max(Duration::from_millis(1));
        }
        assert!((990_000..=1_020_000).contains(&sent), "{sent} bytes in 10 s");
        // After a long rest a tenth of a second is made up for, and no more.
        now += Duration::from_secs(60);
        assert_eq!(pace.sent((Some(100_000), now), 10_000), Duration::ZERO);
        assert_eq!(pace.sent((Some(100_000), now), 10_000), Duration::from_millis(100));
        assert_eq!(pace.sent((None, now), 1 << 40), Duration::ZERO);
        assert_eq!(pace.sent((Some(100_000), now), 100_000), Duration::from_secs(1));
    }
}
