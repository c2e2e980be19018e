//! Pool modes other than the usual one: what they keep and what they refuse.

use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::pool::Mode;
use weir_core::session::pin::Pin;

use super::session::Session;

impl Session {
    /// Session pooling: what this session has used once stays with it. DISCARD ALL reaches one Backend only; what it marked
    /// as in doubt goes.
    pub fn keep_for_mode(&mut self) {
        if self.stats.mode() != Mode::Session {
            return;
        }
        for index in 0..self.held.len() {
            if !self.held[index].lease.is_doubted() {
                self.pin(index, Pin::SessionMode);
            }
        }
    }

    /// Statement pooling: a block that began in a way weir could not see ends with its session.
    pub fn breaks_mode(&self) -> Option<UserError> {
        let breaks = self.txn.is_some() && self.stats.mode() == Mode::Statement;
        breaks.then(|| no_transactions().fatal())
    }
}

/// Statement pooling knows no transaction blocks.
pub fn no_transactions() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "transaction blocks are not allowed in statement pooling mode",
    )
    .detail("pool_mode of this user or database is \"statement\": each statement commits by itself.")
    .hint("Use pool_mode = \"transaction\" for clients that need BEGIN.")
}
