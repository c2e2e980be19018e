//! Writing a question to one Backend, with all that it owes for it.

use bytes::Bytes;
use weir_core::session::replies::{Owed, Replies};
use weir_wire::frontend::{self, Bind, Execute, Object, Parse, Target, put_sync};

use super::Question;
use crate::exec::failures::unexpected;
use crate::front::session::Failure;
use crate::statements::Prepared;

pub fn put_question(
    lease: &mut crate::back::pool::Lease,
    question: Question<'_>,
    replies: &mut Replies,
) -> Result<(), Failure> {
    match question.plain() {
        Question::Text(sql) => {
            lease.put_query(sql);
            replies.push(Owed::Query { hidden: false });
            return Ok(());
        }
        Question::Portal { prepared, bind, merged } => {
            put_bind(lease, (prepared, merged), bind, b"", replies)?;
            put_describe(lease, b"", replies);
            put_execute(lease, replies);
        }
        Question::Once { sql, types, bind, hidden } => {
            put_once(lease, (sql, types), (bind, hidden), b"", replies)?;
            put_describe(lease, b"", replies);
            put_execute(lease, replies);
        }
        Question::Opened { prepared, bind, portal, sql } => {
            match sql {
                None => put_bind(lease, (prepared, true), bind, portal, replies)?,
                Some(sql) => {
                    let hidden = prepared.template.hidden_columns();
                    put_once(lease, (sql, &prepared.types), (bind, hidden), portal, replies)?;
                }
            }
            put_describe(lease, portal, replies);
        }
        Question::Described(portal) => put_describe(lease, portal, replies),
        Question::Guarded(_) => return Err(unexpected("a question within a question")),
    }
    put_sync(&mut lease.out);
    replies.push(Owed::Sync { hidden: false });
    Ok(())
}

/// Binds a text to a portal that gives `hidden` columns beyond those the client knows.
fn put_once(
    lease: &mut crate::back::pool::Lease,
    (sql, types): (&str, &[u8]),
    (bind, hidden): (&Bytes, usize),
    portal: &[u8],
    replies: &mut Replies,
) -> Result<(), Failure> {
    lease.unnamed = None;
    Parse { name: b"", sql: sql.as_bytes(), types }.put(&mut lease.out);
    replies.push(Owed::Parse { hidden: true, op: u32::MAX });
    let bind = Bind::read(bind).map_err(|_| unexpected("a malformed Bind"))?;
    bind.on_portal(portal).put_wider(b"", hidden, &mut lease.out);
    replies.push(Owed::BindComplete { hidden: true });
    Ok(())
}

/// Binds a statement (its `merged` form), prepared first if the Backend does not know it, to a portal.
fn put_bind(
    lease: &mut crate::back::pool::Lease,
    (prepared, merged): (&Prepared, bool),
    bind: &Bytes,
    portal: &[u8],
    replies: &mut Replies,
) -> Result<(), Failure> {
    let (id, sql, hidden) = match &prepared.merged {
        Some(form) if merged => (form.id, &form.sql, prepared.template.hidden_columns()),
        _ => (prepared.id, &prepared.sql, 0),
    };
    let name = Prepared::backend_name(id);
    if !lease.is_prepared(id) {
        if let Some(oldest) = lease.note_prepared(id) {
            let name = Prepared::backend_name(oldest);
            Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::CLOSE, &mut lease.out);
            replies.push(Owed::Close { hidden: true, op: u32::MAX });
        }
        Parse { name: name.as_bytes(), sql, types: &prepared.types }.put(&mut lease.out);
        replies.push(Owed::Parse { hidden: true, op: u32::MAX });
    }
    let bind = Bind::read(bind).map_err(|_| unexpected("a malformed Bind"))?;
    bind.on_portal(portal).put_wider(name.as_bytes(), hidden, &mut lease.out);
    replies.push(Owed::BindComplete { hidden: true });
    Ok(())
}

fn put_describe(lease: &mut crate::back::pool::Lease, portal: &[u8], replies: &mut Replies) {
    Target { object: Object::Portal, name: portal }.put(frontend::tag::DESCRIBE, &mut lease.out);
    replies.push(Owed::Describe);
}

/// Runs the unnamed portal to its end.
fn put_execute(lease: &mut crate::back::pool::Lease, replies: &mut Replies) {
    Execute { portal: b"", rows_max: 0 }.put(&mut lease.out);
    replies.push(Owed::Execute);
}
