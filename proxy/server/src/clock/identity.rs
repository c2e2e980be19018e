//! Which run of which server a position of the WAL is of.

use tokio_postgres::Client;

/// What makes positions comparable: they are, on the same run of the same timeline of the same system.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    system: String,
    timeline: String,
    started: String,
}

impl Identity {
    /// Fails on a server in recovery, which is none whose positions are wanted. The timeline comes from the name of the
    /// current WAL file, because the control file learns of a promotion only at the next checkpoint.
    pub async fn of(client: &Client) -> Result<Identity, tokio_postgres::Error> {
        const ASK: &str = "SELECT (pg_control_system()).system_identifier::text, \
            substring(pg_walfile_name(pg_current_wal_insert_lsn()) for 8), pg_postmaster_start_time()::text";
        let row = client.query_one(ASK, &[]).await?;
        Ok(Identity { system: row.try_get(0)?, timeline: row.try_get(1)?, started: row.try_get(2)? })
    }
}
