//! Opening a connection to a shard's primary, whoever that is by then.
//!
//! Invariant: a server that is in recovery is never taken for the primary, whatever was known of it: what it shows may be old. A
//! statement that has sent nothing waits for a primary, for as long as it would wait for a free connection. Where a shard has one server
//! there is nothing to wait for. Non-goals: choosing the primary ([`crate::roles`]).

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::backend::tag;
use weir_wire::row;

use super::conn::Backend;
use super::connect::{Login, Parameters, Refused, connect, reach};

/// Between two attempts, unless something changes.
const PAUSE: Duration = Duration::from_millis(100);

/// Logs in. `patience`: longest wait for a primary. Errors are ready for the client.
pub async fn open(login: &Login, patience: Duration) -> Result<(Backend, Parameters), UserError> {
    let Some(roles) = login.route.follows() else { return connect(login).await };
    let deadline = Instant::now() + patience;
    loop {
        let mut tenure = roles.tenure();
        // Both may be dropped: a login that is not over has cost nothing but time.
        let attempt = tokio::select! {
            connected = primary(login) => connected,
            // It goes to another one now.
            () = tenure.over() => Err(Refused::Away(replaced(login))),
        };
        let away = match attempt {
            Ok(connected) => return Ok(connected),
            Err(Refused::Said(error)) => return Err(error),
            Err(Refused::Away(error)) => error,
        };
        if Instant::now() >= deadline {
            return Err(away);
        }
        if !tenure.is_over() {
            roles.doubt();
            let _ = timeout_at(deadline, roles.changed_within(PAUSE)).await;
        }
    }
}

/// Logs in, unless the server turns out to be none that accepts writes.
async fn primary(login: &Login) -> Result<(Backend, Parameters), Refused> {
    let (mut backend, parameters) = reach(login).await?;
    let is_standby = match parameters.iter().find(|(name, _)| name == "in_hot_standby") {
        Some((_, value)) => value == "on",
        // Servers before 14 do not say.
        None => in_recovery(&mut backend).await.unwrap_or(true),
    };
    if is_standby { Err(Refused::Away(standby(login))) } else { Ok((backend, parameters)) }
}

/// `None`: the connection broke.
async fn in_recovery(backend: &mut Backend) -> Option<bool> {
    backend.put_query("SELECT pg_catalog.pg_is_in_recovery()");
    backend.send().await.ok()?;
    let mut answer = None;
    loop {
        match backend.receive().await.ok()? {
            (tag::DATA_ROW, body) => {
                let said = row::values(&body).ok()?.first().copied().flatten();
                answer = said.map(|said| said == b"t");
            }
            (tag::READY, _) => return answer,
            _ => {}
        }
    }
}

fn replaced(login: &Login) -> UserError {
    let message = format!("server {} has just become the primary", login.route.endpoint());
    UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, message)
        .detail("Another one was while this connection was being opened.")
        .hint("Retry.")
}

fn standby(login: &Login) -> UserError {
    let message = format!("server {} does not accept writes", login.route.endpoint());
    UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, message)
        .detail("It is a standby now, and another primary is not known yet.")
        .hint("SHOW REPLICAS in the admin database says how each server stands; retry in a moment.")
}
