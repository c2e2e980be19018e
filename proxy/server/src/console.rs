//! The admin console: the database `weir` (or `pgbouncer`) on weir's own port, in both protocols.
//!
//! Non-goals: what the figures are ([`source`]) and how they look (`weir_core::admin`).

mod act;
mod figures;
mod flush;
mod gauges;
pub mod source;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;
use weir_core::admin::{self, Command, Table};
use weir_core::error::UserError;
use weir_wire::backend::{
    AUTHENTICATION_OK, BIND_COMPLETE, CLOSE_COMPLETE, EMPTY_QUERY, NO_PARAMETERS, PARSE_COMPLETE, Status,
    put_backend_key, put_parameter_status, put_ready,
};
use weir_wire::frontend::{Bind, Object, is_binary};

use crate::admin::{Formats, put_description, put_rows, put_simple};
use crate::app::App;
use crate::front::batch::{Batch, Collector, Ending, Op, Request};
use crate::front::client::Client;

/// Statements and portals of one console session; a client that names more is told off.
const NAMES_MAX: usize = 64;

/// What a client may send while it waits for a command; the rest stays with its kernel.
const AHEAD_BYTES_MAX: usize = 64 * 1024;

struct Console<'a> {
    app: &'a Arc<App>,
    client: Client,
    may_change: bool,
    statements: HashMap<Bytes, String>,
    portals: HashMap<Bytes, (String, Vec<i16>)>,
}

/// Serves a console session that is logged in already.
pub async fn run(app: &Arc<App>, client: Client, user: &str) -> io::Result<()> {
    let may_change = app.config().admin_users.iter().any(|name| name == user);
    let mut console = Console { app, client, may_change, statements: HashMap::new(), portals: HashMap::new() };
    console.greet().await?;
    let mut collector = Collector::new(app.config().limits.message_bytes_max);
    loop {
        match collector.next(&mut console.client.inbuf) {
            Err(_) => {
                console.client.put_error(&crate::front::session::malformed());
                return console.client.send().await;
            }
            Ok(Some(Request::Terminate)) => return Ok(()),
            Ok(Some(Request::Query(sql))) => console.simple(&sql).await?,
            Ok(Some(Request::Batch(batch))) => console.batch(batch).await?,
            Ok(Some(Request::FunctionCall(_))) => console.refuse(&crate::front::session::malformed()),
            Ok(None) => {
                if console.client.receive().await? == 0 {
                    return Ok(());
                }
                continue;
            }
        }
        console.client.send().await?;
    }
}

impl Console<'_> {
    async fn greet(&mut self) -> io::Result<()> {
        let out = &mut self.client.out;
        out.extend_from_slice(AUTHENTICATION_OK);
        let version = concat!(env!("CARGO_PKG_VERSION"), "/weir");
        for (name, value) in [
            ("server_version", version),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "UTC"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
        ] {
            put_parameter_status(out, name.as_bytes(), value.as_bytes());
        }
        put_backend_key(out, 0, &[0; 4]);
        put_ready(out, Status::Idle);
        self.client.send().await
    }

    fn refuse(&mut self, error: &UserError) {
        self.client.put_error(error);
        put_ready(&mut self.client.out, Status::Idle);
    }

    async fn simple(&mut self, sql: &[u8]) -> io::Result<()> {
        let text = String::from_utf8_lossy(sql);
        if text.trim().trim_end_matches(';').trim().is_empty() {
            self.client.out.extend_from_slice(EMPTY_QUERY);
        } else {
            let answered = match self.carry_out(&text).await? {
                Ok(Some(table)) => Ok(table),
                Ok(None) => self.table(&text),
                Err(error) => Err(error),
            };
            let answered = answered.and_then(|table| put_simple(&table, &mut self.client.out));
            if let Err(error) = answered {
                self.client.put_error(&error);
            }
        }
        put_ready(&mut self.client.out, Status::Idle);
        Ok(())
    }

    /// Does what the command asks for, if it changes something or servers have to be asked; gives the answer if it has one of its
    /// own. An error of IO: the client left meanwhile.
    async fn carry_out(&mut self, text: &str) -> io::Result<Result<Option<Table>, UserError>> {
        let command = match admin::command::parse(text) {
            Ok(command @ (Command::Act(_) | Command::Reshard(_))) => command,
            Ok(_) => return Ok(Ok(None)),
            Err(error) => return Ok(Err(error)),
        };
        let only_reads = matches!(&command, Command::Reshard(reshard) if reshard.only_reads());
        if !self.may_change && !only_reads {
            let message = "permission denied: only admin_users may change things";
            let error = UserError::new(weir_core::error::Blame::Client, "42501", message);
            return Ok(Err(error.hint("List the user in admin_users of the config file.")));
        }
        let app = Arc::clone(self.app);
        let acting = async {
            match &command {
                Command::Act(act) => act::act(&app, act).await.map(|warning| (None, warning)),
                Command::Reshard(reshard) => crate::reshard::run(&app, reshard).await.map(|table| (Some(table), None)),
                _ => Ok((None, None)),
            }
        };
        let mut acting = std::pin::pin!(acting);
        loop {
            // Both are cancel-safe: the command is polled again by reference, and what has been received is kept.
            tokio::select! {
                biased;
                done = &mut acting => {
                    return Ok(done.map(|(answer, warning)| {
                        if let Some(warning) = warning {
                            warning.put(&mut self.client);
                        }
                        answer
                    }));
                }
                received = self.client.receive(), if self.client.inbuf.len() < AHEAD_BYTES_MAX => {
                    if received? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
    }

    fn table(&self, text: &str) -> Result<Table, UserError> {
        admin::answer(&admin::command::parse(text)?, &source::Source { app: self.app, sees_keys: self.may_change })
    }

    async fn batch(&mut self, batch: Batch) -> io::Result<()> {
        for op in batch.ops {
            let done = match &op {
                Op::Execute { portal, .. } => match self.portals.get(portal).map(|(text, _)| text.clone()) {
                    Some(text) => self.carry_out(&text).await?,
                    None => Ok(None),
                },
                _ => Ok(None),
            };
            if let Err(error) = done.and_then(|answer| self.op(op, answer)) {
                self.client.put_error(&error);
                break;
            }
        }
        if batch.ending == Ending::Sync {
            put_ready(&mut self.client.out, Status::Idle);
        }
        Ok(())
    }

    /// `answer`: of an Execute, if the command has one of its own.
    fn op(&mut self, op: Op, answer: Option<Table>) -> Result<(), UserError> {
        match op {
            Op::Parse { name, sql, .. } => {
                let text = String::from_utf8_lossy(&sql).into_owned();
                admin::command::parse(&text)?;
                keep(&mut self.statements, name, text)?;
                self.client.out.extend_from_slice(PARSE_COMPLETE);
            }
            Op::Bind { portal, statement, body } => {
                let text = self.statements.get(&statement).cloned().ok_or_else(crate::front::session::malformed)?;
                let bind = Bind::read(&body).map_err(|_| crate::front::session::malformed())?;
                let formats = (0..bind.result_formats.len() / 2)
                    .map(|column| i16::from(is_binary(bind.result_formats, column)))
                    .collect();
                keep(&mut self.portals, portal, (text, formats))?;
                self.client.out.extend_from_slice(BIND_COMPLETE);
            }
            Op::Describe { object: Object::Statement, name } => {
                let text = self.statements.get(&name).cloned().ok_or_else(crate::front::session::malformed)?;
                let table = self.table(&text)?;
                self.client.out.extend_from_slice(NO_PARAMETERS);
                put_description(&table, Formats::TEXT, &mut self.client.out)?;
            }
            Op::Describe { object: Object::Portal, name } => {
                let (table, formats) = self.bound(&name)?;
                put_description(&table, Formats::new(&formats, table.columns.len())?, &mut self.client.out)?;
            }
            Op::Execute { portal, .. } => {
                let (table, formats) = self.bound(&portal)?;
                let table = answer.unwrap_or(table);
                put_rows(&table, Formats::new(&formats, table.columns.len())?, &mut self.client.out)?;
            }
            Op::Close { object, name } => {
                match object {
                    Object::Statement => drop(self.statements.remove(&name)),
                    Object::Portal => drop(self.portals.remove(&name)),
                }
                self.client.out.extend_from_slice(CLOSE_COMPLETE);
            }
        }
        Ok(())
    }

    fn bound(&self, portal: &Bytes) -> Result<(Table, Vec<i16>), UserError> {
        let (text, formats) = self.portals.get(portal).cloned().ok_or_else(crate::front::session::malformed)?;
        Ok((self.table(&text)?, formats))
    }
}

fn keep<V>(names: &mut HashMap<Bytes, V>, name: Bytes, value: V) -> Result<(), UserError> {
    if names.len() >= NAMES_MAX && !names.contains_key(&name) {
        return Err(UserError::new(
            weir_core::error::Blame::Client,
            "54000",
            "too many statements in one console session",
        )
        .hint("Close what is no longer needed."));
    }
    names.insert(Bytes::copy_from_slice(&name), value);
    Ok(())
}
