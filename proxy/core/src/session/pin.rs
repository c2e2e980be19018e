//! Why a session keeps its server connection between transactions.
//!
//! Invariant: every state that cannot be replayed on another connection has a name here; the names are metric labels and
//! appear in SHOW PINS, so they never change their meaning.

use std::fmt;

/// One reason to keep the connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Pin {
    /// A temporary table, view or sequence may exist.
    TempTable,
    /// A session-level advisory lock may be held.
    AdvisoryLock,
    /// A cursor WITH HOLD outlives its transaction.
    HoldCursor,
    /// A statement prepared in SQL, known to one connection only.
    SqlPrepare,
    /// Notifications come to this connection.
    Listen,
    /// set_config() changed a setting out of sight.
    SetConfig,
    /// currval() or lastval() ask what this connection drew last.
    SequenceState,
    /// A SET whose fate (savepoints) could not be followed.
    SetInsideUncertainTransaction,
    /// LOAD brought a library into the server process.
    LoadedLibrary,
    /// setseed() or SET seed: the random sequence belongs to the connection.
    RandomSeed,
    /// dblink keeps connections of its own in the server process.
    Dblink,
    /// A function was called, or made, that may leave any of these behind, or keeps state of its own.
    Function,
    /// Text that could not be read and may hold any of these.
    Unparsed,
    /// Session pooling was asked for.
    SessionMode,
}

impl Pin {
    pub const ALL: [Pin; 14] = [
        Pin::TempTable,
        Pin::AdvisoryLock,
        Pin::HoldCursor,
        Pin::SqlPrepare,
        Pin::Listen,
        Pin::SetConfig,
        Pin::SequenceState,
        Pin::SetInsideUncertainTransaction,
        Pin::LoadedLibrary,
        Pin::RandomSeed,
        Pin::Dblink,
        Pin::Function,
        Pin::Unparsed,
        Pin::SessionMode,
    ];

    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Pin::TempTable => "temp_table",
            Pin::AdvisoryLock => "advisory_lock",
            Pin::HoldCursor => "hold_cursor",
            Pin::SqlPrepare => "sql_prepare",
            Pin::Listen => "listen",
            Pin::SetConfig => "set_config",
            Pin::SequenceState => "sequence_state",
            Pin::SetInsideUncertainTransaction => "set_inside_uncertain_transaction",
            Pin::LoadedLibrary => "loaded_library",
            Pin::RandomSeed => "random_seed",
            Pin::Dblink => "dblink",
            Pin::Function => "function",
            Pin::Unparsed => "unparsed",
            Pin::SessionMode => "session_mode",
        }
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A set of reasons.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Pins(u16);

impl Pins {
    pub const NONE: Pins = Pins(0);

    pub fn insert(&mut self, pin: Pin) {
        self.0 |= 1 << pin as u8;
    }

    pub fn contains(self, pin: Pin) -> bool {
        self.0 & 1 << pin as u8 != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn union(self, other: Pins) -> Pins {
        Pins(self.0 | other.0)
    }

    pub fn iter(self) -> impl Iterator<Item = Pin> {
        Pin::ALL.into_iter().filter(move |&pin| self.contains(pin))
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_has_a_bit_and_a_name_of_its_own() {
        let mut pins = Pins::NONE;
        for (count, pin) in Pin::ALL.into_iter().enumerate() {
            assert!(!pins.contains(pin), "{pin}");
            pins.insert(pin);
            assert_eq!(pins.iter().count(), count + 1);
        }
        let names: std::collections::BTreeSet<&str> = Pin::ALL.iter().map(|pin| pin.as_str()).collect();
        assert_eq!(names.len(), Pin::ALL.len());
    }
}
