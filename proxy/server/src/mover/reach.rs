//! The mover's connections to servers, and why none of them outlives its right to be used.
//!
//! Invariant: a connection is handed out only if the hub has said, after it was opened, that this proxy drives the moves still. Whoever
//! takes a move up ends all other connections of that move before it does anything. So a mover that was stopped and wakes up when
//! another one has taken over can change nothing: what it had opened is gone, and what it opens now is not handed out.
//! Non-goal: what is said over them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use super::sql;
use crate::back::connect::Login;
use crate::back::walsender::Walsender;
use crate::control::{OpenError, target};
use crate::hub::moves::Driving;

/// How they are named on the servers; what they are for and a number of the attempt follow.
const NAME: &str = "weir mover";
/// Longest wait until a connection can be used; a server that hangs takes it and says nothing.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// Longest wait for others' connections to end.
const ALONE_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// Ends connections of the same purpose ($1) and another attempt than this one ($2).
const END_OTHERS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                          WHERE starts_with(application_name, $1) AND application_name <> $2 AND datname = current_database()";

/// A server that one attempt of a mover works on.
#[derive(Clone)]
pub(super) struct Reach {
    login: Login,
    driving: Arc<Driving>,
    /// Up to the attempt's number.
    purpose: Arc<str>,
    name: Arc<str>,
}

impl Reach {
    /// Of a new attempt. `what`: what its connections are for, as a name can say it.
    pub(super) fn new(driving: &Arc<Driving>, what: &str, logins: [Login; 2]) -> [Reach; 2] {
        let purpose: Arc<str> = format!("{NAME} {what} ").into();
        let name: Arc<str> = format!("{purpose}{:08x}", rand::random::<u32>()).into();
        let driving = Arc::clone(driving);
        logins.map(|login| Reach {
            login,
            driving: Arc::clone(&driving),
            purpose: Arc::clone(&purpose),
            name: Arc::clone(&name),
        })
    }

    pub(super) fn login(&self) -> &Login {
        &self.login
    }

    /// Ends what earlier attempts have left open, of this proxy's or of another one's, and waits until it is gone.
    pub(super) async fn be_alone(&self) -> Result<()> {
        let client = self.open().await?;
        let begun = Instant::now();
        while !client.query(END_OTHERS, &[&&*self.purpose, &&*self.name]).await?.is_empty() {
            if begun.elapsed() > ALONE_MAX {
                bail!("connections of an earlier attempt do not end");
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// One with the settings that all have.
    pub(super) async fn open(&self) -> Result<Client> {
        let opened = async {
            let mut target = target(&self.login);
            target.config.application_name(&*self.name);
            let client = target.open().await.map_err(OpenError::into_anyhow);
            let client = client.with_context(|| self.login.route.endpoint().to_string())?;
            client.batch_execute(sql::SETTINGS).await.context("settings")?;
            self.driving.holds().await.context("the right to drive the moves")?;
            Ok(client)
        };
        timeout(OPEN_MAX, opened).await.with_context(|| format!("{} does not answer", self.login.route.endpoint()))?
    }

    /// One that speaks the walsender's language.
    pub(super) async fn walsender(&self) -> Result<Walsender> {
        let opened = async {
            let server = Walsender::connect(&self.login, &self.name, &sql::WALSENDER_SETTINGS).await?;
            self.driving.holds().await.context("the right to drive the moves")?;
            Ok(server)
        };
        timeout(OPEN_MAX, opened).await.with_context(|| format!("{} does not answer", self.login.route.endpoint()))?
    }
}
