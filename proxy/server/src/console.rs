//! The admin console: the database `weir` (or `pgbouncer`) on weir's own port, in both protocols.
//!
//! Non-goals: what the figures are ([`source`]) and how they look (`weir_core::admin`).

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
            Ok(Some(Request::Query(sql))) => console.simple(&sql),
            Ok(Some(Request::Batch(batch))) => console.batch(batch),
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

    fn simple(&mut self, sql: &[u8]) {
        let text = String::from_utf8_lossy(sql);
        if text.trim().trim_end_matches(';').trim().is_empty() {
            self.client.out.extend_from_slice(EMPTY_QUERY);
        } else {
            let result = self.table(&text).and_then(|table| put_simple(&table, &mut self.client.out));
            if let Err(error) = result {
                self.client.put_error(&error);
            }
        }
        put_ready(&mut self.client.out, Status::Idle);
    }

    fn table(&self, text: &str) -> Result<Table, UserError> {
        let command = admin::command::parse(text)?;
        if matches!(command, Command::Reload) && !self.may_change {
            return Err(UserError::new(
                weir_core::error::Blame::Client,
                "42501",
                "permission denied: only admin_users may change things",
            )
            .hint("List the user in admin_users of the config file."));
        }
        admin::answer(&command, &source::Source(self.app))
    }

    fn batch(&mut self, batch: Batch) {
        for op in batch.ops {
            if let Err(error) = self.op(op) {
                self.client.put_error(&error);
                break;
            }
        }
        if batch.ending == Ending::Sync {
            put_ready(&mut self.client.out, Status::Idle);
        }
    }

    fn op(&mut self, op: Op) -> Result<(), UserError> {
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
