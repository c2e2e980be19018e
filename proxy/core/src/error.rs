//! What a client reads when weir itself refuses or fails: one type, always with SQLSTATE, and with DETAIL and HINT
//! wherever there is something to say. Errors of the servers are relayed as they are and never pass through here.

use std::borrow::Cow;

/// SQLSTATEs weir itself raises (Postgres appendix A).
pub mod sqlstate {
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    pub const CONNECTION_FAILURE: &str = "08006";
    pub const CANNOT_CONNECT: &str = "08001";
    pub const INVALID_PASSWORD: &str = "28P01";
    pub const INVALID_AUTHORIZATION: &str = "28000";
    pub const UNKNOWN_DATABASE: &str = "3D000";
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    pub const IN_FAILED_TRANSACTION: &str = "25P02";
    pub const UNKNOWN_STATEMENT: &str = "26000";
    pub const UNKNOWN_PORTAL: &str = "34000";
    pub const DUPLICATE_STATEMENT: &str = "42P05";
    pub const SYNTAX_ERROR: &str = "42601";
    pub const TOO_COMPLEX: &str = "54000";
    pub const TRANSACTION_UNKNOWN: &str = "08007";
    pub const INVALID_PARAMETER_VALUE: &str = "22023";
    pub const QUERY_CANCELED: &str = "57014";
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
    pub const IDLE_IN_TRANSACTION_TIMEOUT: &str = "25P03";
    pub const TRANSACTION_TIMEOUT: &str = "25P04";
    pub const SERIALIZATION_FAILURE: &str = "40001";
    pub const DEADLOCK_DETECTED: &str = "40P01";
    pub const UNIQUE_VIOLATION: &str = "23505";
    pub const INTERNAL: &str = "XX000";
}

/// Who caused it: decides the log level and the metric label, and whether a retry elsewhere makes sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blame {
    Client,
    Server,
    Proxy,
}

/// Does the session survive the error?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    Error,
    Fatal,
}

/// An error for the client, in Postgres's own fields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserError {
    pub blame: Blame,
    pub severity: Severity,
    pub sqlstate: &'static str,
    pub message: Cow<'static, str>,
    pub detail: Option<Cow<'static, str>>,
    pub hint: Option<Cow<'static, str>>,
    /// The function in Postgres that raises the same error, where drivers tell errors apart by it.
    pub routine: Option<&'static str>,
}

impl UserError {
    pub fn new(blame: Blame, sqlstate: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        let message = message.into();
        UserError { blame, severity: Severity::Error, sqlstate, message, detail: None, hint: None, routine: None }
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn routine(mut self, routine: &'static str) -> Self {
        self.routine = Some(routine);
        self
    }

    #[must_use]
    pub fn fatal(mut self) -> Self {
        self.severity = Severity::Fatal;
        self
    }
}

impl std::fmt::Display for UserError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.sqlstate, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl std::error::Error for UserError {}
