//! A replication connection: commands of the walsender, a stream of WAL as the plugin pgoutput has it, and the answers that keep the
//! server from holding what was taken.
//!
//! Non-goals: which slots there are and what becomes of what they send.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use tokio::time::timeout;
use weir_wire::backend::{report_field, tag};
use weir_wire::pgoutput::put_status;
use weir_wire::row;

use super::conn::Backend;
use super::connect::{Login, connect_as};

const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Microseconds from 1970 to 2000, where Postgres's clock begins.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// A connection that may speak the walsender's language.
pub struct Walsender {
    backend: Backend,
}

impl Walsender {
    /// `settings`: of this connection, beside those that any such connection has.
    pub async fn connect(login: &Login, application_name: &str, settings: &[(&str, &str)]) -> Result<Walsender> {
        let mut parameters = vec![
            ("user", &*login.user),
            ("database", &*login.database),
            ("replication", "database"),
            ("application_name", application_name),
            // If weir is stopped or cut off, the connection goes that soon, whatever the server's own setting is.
            ("wal_sender_timeout", "10s"),
            ("statement_timeout", "0"),
            ("lock_timeout", "0"),
        ];
        parameters.extend_from_slice(settings);
        let (backend, _) = connect_as(login, &parameters).await.map_err(|error| anyhow!("{error}"))?;
        Ok(Walsender { backend })
    }

    /// Runs a command to its end: its first row, if it has one, as text. The caller bounds the wait.
    pub async fn command(&mut self, command: &str) -> Result<Vec<Option<String>>> {
        self.backend.put_query(command);
        self.backend.send().await?;
        let mut found = Vec::new();
        loop {
            match self.backend.receive().await? {
                (tag::READY, _) => return Ok(found),
                (tag::ERROR, body) => return Err(said(&body)),
                (tag::DATA_ROW, body) if found.is_empty() => {
                    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
                    found = row::values(&body)?.into_iter().map(|value| value.map(text)).collect();
                }
                _ => {}
            }
        }
    }

    /// Starts to stream; from here on only [`Walsender::receive`] and [`Walsender::confirm`].
    pub async fn start(&mut self, command: &str) -> Result<()> {
        timeout(START_TIMEOUT, self.begin(command)).await.context("the stream did not start in time")?
    }

    async fn begin(&mut self, command: &str) -> Result<()> {
        self.backend.put_query(command);
        self.backend.send().await?;
        loop {
            match self.backend.receive().await? {
                (tag::COPY_BOTH, _) => return Ok(()),
                (tag::ERROR, body) => return Err(said(&body)),
                (tag::READY, _) => bail!("the server ended the stream at once"),
                _ => {}
            }
        }
    }

    /// The next piece of the stream ([`weir_wire::pgoutput::read_copied`]). May be dropped while it waits: a frame is taken whole or
    /// not at all.
    pub async fn receive(&mut self) -> Result<Bytes> {
        loop {
            let (tag, body) = self.backend.receive().await.context("the stream broke")?;
            match tag {
                tag::COPY_DATA => return Ok(body),
                tag::ERROR => return Err(said(&body)),
                tag::COPY_DONE | tag::COMMAND_COMPLETE | tag::READY => bail!("the server has ended the stream"),
                _ => {}
            }
        }
    }

    /// Everything below `position` is not needed any more.
    pub async fn confirm(&mut self, position: u64) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64;
        put_status(&mut self.backend.out, position, now - POSTGRES_EPOCH_US);
        self.backend.send().await.context("the stream broke")
    }
}

/// A server's error message.
fn said(body: &[u8]) -> anyhow::Error {
    let field =
        |code| report_field(body, code).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default();
    anyhow!("{} ({})", field(b'M'), field(b'C'))
}
