//! What a client reads when several shards cannot answer as one, or when the only one is lost.

use weir_core::error::{Blame, UserError, sqlstate};

use crate::front::session::Failure;

pub fn no_common_snapshot() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "no common snapshot over several shards")
        .detail("The transaction is REPEATABLE READ or SERIALIZABLE, and the statement reads several shards, each with a snapshot of its own.")
        .hint("Make it READ ONLY as well (not DEFERRABLE), which sees all shards at one moment; or use READ COMMITTED, or one shard key.")
}

pub fn not_utf8() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "COPY into a sharded table reads UTF-8 only")
        .detail("client_encoding is another one, and weir has to read the shard key of every row.")
        .hint("SET client_encoding TO 'UTF8'.")
}

/// A commit over several shards that took so long that its proxy was taken for dead.
pub fn overtaken_by_recovery() -> UserError {
    UserError::new(Blame::Server, sqlstate::SERIALIZATION_FAILURE, "the distributed transaction was rolled back")
        .detail("Its shards took so long to prepare that recovery ended it.")
        .hint("Run the transaction again.")
}

pub fn stale_catalogue() -> UserError {
    UserError::new(Blame::Proxy, sqlstate::FEATURE_NOT_SUPPORTED, "the table has changed behind weir")
        .detail("The shards' rows have other columns than the statement was planned for.")
        .hint("Repeat it in half a minute, when the catalogue has been read again; DDL through weir is known at once.")
}

pub fn unexpected(what: &str) -> Failure {
    UserError::new(Blame::Server, sqlstate::INTERNAL, "a shard answered unexpectedly")
        .detail(what.to_owned())
        .fatal()
        .into()
}

pub fn state_not_taken_over(name: &str, why: &str) -> UserError {
    UserError::new(Blame::Server, sqlstate::INTERNAL, "the server connection could not take over this session's state")
        .detail(format!("{name}: {why}"))
        .hint("RESET ALL clears the session's settings.")
}

pub fn lost(name: &str, why: &str) -> UserError {
    UserError::new(Blame::Server, sqlstate::CONNECTION_FAILURE, "the server connection was lost")
        .detail(format!("{name}: {why}"))
        .hint("Whether the last statement took effect is not known; connect again and check.")
        .fatal()
}

pub fn lost_shard(error: &std::io::Error) -> Failure {
    UserError::new(Blame::Server, sqlstate::CONNECTION_FAILURE, "the connection to a shard was lost")
        .detail(error.to_string())
        .hint("Whether the last statement took effect is not known; connect again and check.")
        .fatal()
        .into()
}
