//! The clock's connection to the primary, and what it is asked for.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Statement};
use weir_core::fresh::bound::WAL_PAGE_BYTES;
use weir_core::fresh::decoded::Snapshot;
use weir_core::id::Lsn;

use super::{Identity, QUERY_TIMEOUT};
use crate::control::{OpenError, Target};
use crate::roles::Tenure;
use crate::sole::{Look, Sole};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The snapshot is the statement's own, so what it shows is below the position, which is asked for afterwards.
const POSITION: &str = "SELECT pg_current_wal_insert_lsn(), pg_current_snapshot()::text";
const BACKENDS: &str = "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = ANY($1)";

/// A connection to the primary, with its statements prepared.
pub(super) struct Primary {
    pub(super) client: Client,
    pub(super) identity: Identity,
    position: Statement,
    backends: Statement,
    pub(super) look: Look,
    /// The allowance for page headers holds for standard pages only; otherwise no word is ever given a position.
    pub(super) standard_pages: bool,
    pub(super) tenure: Tenure,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ClockError {
    #[error(transparent)]
    Server(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Unreached(#[from] OpenError),
    #[error("another server has become the primary")]
    Replaced,
    #[error("it has closed the connection")]
    Closed,
    #[error("the server's snapshot cannot be read: {0}")]
    Snapshot(String),
    #[error("no answer in time")]
    Slow(#[from] tokio::time::error::Elapsed),
}

impl Primary {
    /// And what ends with its connection.
    pub(super) async fn connect(server: &Target, sole: &Sole) -> Result<(Primary, mpsc::Receiver<()>), ClockError> {
        let tenure = server.tenure();
        let (tell, heard) = mpsc::channel(1);
        let client = timeout(CONNECT_TIMEOUT, server.open_hearing(tell)).await??;
        let primary = timeout(CONNECT_TIMEOUT, Self::prepare(client, tenure, sole)).await??;
        Ok((primary, heard))
    }

    async fn prepare(client: Client, tenure: Tenure, sole: &Sole) -> Result<Primary, ClockError> {
        let identity = Identity::of(&client).await?;
        let page_bytes: i64 =
            client.query_one("SELECT current_setting('wal_block_size')::int8", &[]).await?.try_get(0)?;
        let standard_pages = u64::try_from(page_bytes) == Ok(WAL_PAGE_BYTES);
        if !standard_pages {
            tracing::error!(page_bytes, "clock: the server has another WAL page size than 8192; replicas are not used");
        }
        let position = client.prepare(POSITION).await?;
        let backends = client.prepare(BACKENDS).await?;
        let look = sole.raise(&client).await?;
        Ok(Primary { client, identity, position, backends, look, standard_pages, tenure })
    }

    pub(super) async fn position(&self) -> Result<(Lsn, Snapshot), ClockError> {
        let row = timeout(QUERY_TIMEOUT, self.client.query_one(&self.position, &[])).await??;
        let (lsn, snapshot): (PgLsn, &str) = (row.try_get(0)?, row.try_get(1)?);
        let snapshot = Snapshot::parse(snapshot).ok_or_else(|| ClockError::Snapshot(snapshot.to_owned()))?;
        Ok((Lsn(lsn.into()), snapshot))
    }

    /// Which of these processes exist, and since when.
    pub(super) async fn present(&self, pids: &[i32]) -> Result<Vec<(i32, Option<String>)>, ClockError> {
        let rows = timeout(QUERY_TIMEOUT, self.client.query(&self.backends, &[&pids])).await??;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }
}

/// Until the connection that was opened hearing this is closed.
pub(super) async fn closed(heard: &mut mpsc::Receiver<()>) {
    while heard.recv().await.is_some() {}
}
