//! What admin users can do in the console: RELOAD, PAUSE, RESUME, RECONNECT, KILL, KILL_CLIENT, FLUSH; as PgBouncer's users know them.
//!
//! Non-goal: waiting for ever on behalf of a client that has gone; the console drops the future then.

use std::sync::Arc;
use std::time::Duration;

use weir_core::admin::Act;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::backend::{Report, tag};

use super::flush;
use crate::app::App;
use crate::database::Database;
use crate::front::client::Client;
use crate::front::time_out::Order;

/// How often PAUSE looks whether the last transaction has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Something the client should know although the command has succeeded.
pub struct Warning {
    message: &'static str,
    detail: String,
}

impl Warning {
    pub fn put(&self, client: &mut Client) {
        let report = Report {
            severity: "WARNING",
            sqlstate: "01000",
            message: self.message,
            detail: Some(&self.detail),
            hint: None,
            routine: None,
        };
        report.put(tag::NOTICE, &mut client.out);
    }
}

/// Carries a command out. Dropping the future leaves a pause in force, and only stops waiting for it.
pub async fn act(app: &Arc<App>, act: &Act) -> Result<Option<Warning>, UserError> {
    match act {
        Act::Reload => {
            let fixed = crate::reload::reload(app)?;
            let message = "some changed settings take effect after a restart only";
            return Ok((!fixed.is_empty()).then(|| Warning { message, detail: fixed.join(", ") }));
        }
        Act::Pause(name) => pause(app, name.as_deref()).await?,
        Act::Resume(name) => {
            if name.is_none() {
                app.databases.note_pause(false);
            }
            for db in chosen(app, name.as_deref())? {
                db.resume();
            }
        }
        Act::Reconnect(name) => chosen(app, name.as_deref())?.iter().for_each(|db| db.reconnect()),
        Act::Kill(name) => {
            for db in chosen(app, Some(name))? {
                db.pause();
                for session in db.stats.live() {
                    session.order(Order::Killed);
                    session.cancel_running();
                }
            }
        }
        Act::Flush(what) => flush::flush(app, what).await?,
        Act::KillClient(id) => {
            let all = app.databases();
            let session = all.iter().flat_map(|db| db.stats.live()).find(|session| session.id == *id);
            let Some(session) = session else {
                return Err(UserError::new(Blame::Client, "42704", format!("there is no client {id}"))
                    .hint("SHOW CLIENTS has the numbers in its column id."));
            };
            session.order(Order::Killed);
            session.cancel_running();
        }
    }
    Ok(None)
}

async fn pause(app: &App, name: Option<&str>) -> Result<(), UserError> {
    if name.is_none() {
        app.databases.note_pause(true);
    }
    let paused = chosen(app, name)?;
    for db in &paused {
        db.pause();
    }
    while !paused.iter().all(|db| db.is_quiet()) {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

pub(super) fn chosen(app: &App, name: Option<&str>) -> Result<Vec<Arc<Database>>, UserError> {
    let all = app.databases();
    let Some(name) = name else { return Ok(all) };
    let found: Vec<_> = all.into_iter().filter(|db| &*db.name == name).collect();
    if found.is_empty() {
        return Err(UserError::new(Blame::Client, sqlstate::UNKNOWN_DATABASE, format!("no such database: {name}"))
            .hint("SHOW DATABASES lists what is set up."));
    }
    Ok(found)
}
