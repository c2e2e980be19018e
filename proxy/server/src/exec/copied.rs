//! `COPY (query) TO STDOUT` on the fallback engine: the query inside, where it has to be looked at by itself.
//!
//! Invariant: what is refused of a query because of its columns is refused of its COPY too, whose own answer does not tell them.
//! Non-goal: running the COPY, which goes to the hub as it is.

use bytes::Bytes;
use weir_core::copy::query_of;
use weir_core::error::UserError;
use weir_core::plan::Plan;
use weir_wire::backend::{Status, tag};
use weir_wire::frontend::{self, Object, Parse, Target, put_sync};
use weir_wire::row;

use super::commit::answer;
use super::engine::{Asked, Open};
use super::own_types::{groups, no_groups_of_intervals};
use crate::back::pool::Lease;
use crate::front::session::{End, Failure, Session};

/// What the columns of a COPY's query are.
#[derive(PartialEq, Eq, Debug)]
pub enum Copied {
    /// The COPY may run, or is none.
    Fits,
    /// The server does not take the query; it will say so of the COPY as well.
    Unknown,
    Lost,
}

impl Session {
    /// Refuses a COPY whose query would be refused.
    pub async fn look_at_copied(&mut self, open: &Open, asked: &Asked<'_>, plan: &Plan) -> Result<Copied, UserError> {
        let query = query_of(asked.sql).map(|range| &asked.sql[range]);
        let Some(query) = query.filter(|query| groups(query)) else { return Ok(Copied::Fits) };
        let lease = &mut self.held[open.index].lease;
        let looking = async {
            // So that a mistake in it is told by the COPY, in its own transaction.
            lease.put_query("SAVEPOINT weir");
            let _ = answer(lease, &mut self.client).await?;
            let described = describe(lease, query).await?;
            if described.is_none() {
                lease.put_query("ROLLBACK TO weir");
                let _ = answer(lease, &mut self.client).await?;
            }
            Ok::<_, std::io::Error>(described)
        };
        match looking.await {
            Ok(Some(body)) => {
                let Ok(fields) = row::fields(&body) else { return Ok(Copied::Unknown) };
                no_groups_of_intervals(&fields, query, plan)?;
                Ok(Copied::Fits)
            }
            Ok(None) => Ok(Copied::Unknown),
            Err(_) => {
                lease.doubt("lost while the fallback engine was asked");
                Ok(Copied::Lost)
            }
        }
    }
}

/// The query's RowDescription; `None`: the server does not take it.
async fn describe(lease: &mut Lease, query: &str) -> std::io::Result<Option<Bytes>> {
    lease.unnamed = None;
    Parse { name: b"", sql: query.as_bytes(), types: b"" }.put(&mut lease.out);
    Target { object: Object::Statement, name: b"" }.put(frontend::tag::DESCRIBE, &mut lease.out);
    put_sync(&mut lease.out);
    lease.send().await?;
    let mut described = None;
    loop {
        let (kind, body) = lease.receive().await?;
        match kind {
            tag::ROW_DESCRIPTION => described = Some(body),
            tag::READY => {
                let malformed = |error| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
                lease.status = Status::read(&body).map_err(malformed)?;
                return Ok(described);
            }
            _ => {}
        }
    }
}

/// The engine is gone amid a statement.
pub fn lost_engine() -> Failure {
    End::Fatal(super::failures::lost("the fallback engine", "the connection ended")).into()
}
