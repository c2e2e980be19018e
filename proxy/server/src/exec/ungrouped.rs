//! A statement that the fallback engine refuses with 42803, because its tables have no primary keys: is it right on one server, and
//! what has to be in GROUP BY.
//!
//! Invariant: the client's text is edited only after the home shard has taken it as it is; else the client gets that shard's error.
//! Non-goal: the edit itself ([`weir_core::plan::grouped_too`]).

use bytes::Bytes;
use weir_core::copy::query_of;
use weir_core::plan::{Plan, grouped_too};
use weir_core::session::vars::replay;
use weir_wire::backend::{report_field, tag, with_report_field};
use weir_wire::frame;
use weir_wire::frontend::{Parse, put_sync};

use super::commit::{Answer, answer};
use super::engine::{Asked, cannot};
use super::failures::lost_shard;
use super::fan::Question;
use crate::front::session::{Failure, Session};

/// Postgres's own words of a column outside GROUP BY.
#[derive(PartialEq, Eq, Debug, Default)]
pub struct Complaint {
    /// Counts characters of the statement from 1.
    position: usize,
    message: String,
}

impl Complaint {
    /// From the error among `frames`.
    pub fn read(frames: &[u8]) -> Self {
        let mut rest = frames;
        while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
            rest = &rest[next.raw.len()..];
            if next.tag == tag::ERROR {
                let field =
                    |code| report_field(next.body, code).map(String::from_utf8_lossy).unwrap_or_default().into_owned();
                return Complaint { position: field(b'P').parse().unwrap_or(0), message: field(b'M') };
            }
        }
        Complaint::default()
    }

    /// The statement with that column in its GROUP BY.
    pub fn mended(&self, sql: &str) -> Option<String> {
        grouped_too(sql, self.position, &self.message)
    }
}

/// An error of a part of the statement, as one of the whole: `before` stands in front of the part.
fn with_position_behind(error: &Bytes, before: &str) -> Bytes {
    let position = report_field(error, b'P').and_then(|text| std::str::from_utf8(text).ok()?.parse::<usize>().ok());
    let Some(position) = position.filter(|_| !before.is_empty()) else { return error.clone() };
    let whole = position + before.chars().count();
    with_report_field(error, b'P', whole.to_string().as_bytes())
}

impl Session {
    /// Does the home shard, whose tables have their keys, take the statement? Its complaint is the client's answer if not.
    pub async fn home_takes(&mut self, asked: &Asked<'_>, plan: &Plan) -> Result<bool, Failure> {
        let home = self.view().topology.home;
        if self.held.iter().any(|held| held.shard == home) {
            // A mistake would end its transaction, and another Backend of the same pool may never come.
            let why =
                "tables have no primary keys there, and the home shard, which has them, is busy with this transaction";
            return Err(cannot(plan, why).hint("Name the column in GROUP BY.").into());
        }
        // A COPY is looked into only when it runs.
        let query = query_of(asked.sql).unwrap_or(0..asked.sql.len());
        let mut lease = Box::pin(self.cancel.slot.unless_cancelled(self.pools.primary(home).lease())).await?;
        let wanted = self.vars.current().clone();
        let asking = async {
            if let Some(sql) = replay(&lease.vars, &wanted) {
                lease.put_query(&sql);
                if let Err(refusal) = answer(&mut lease, &mut self.client).await? {
                    return Ok(Err(refusal));
                }
            }
            lease.vars.clone_from(&wanted);
            lease.unnamed = None;
            let types: &[u8] = match asked.question {
                Question::Portal { prepared, .. } => &prepared.types,
                _ => &[],
            };
            Parse { name: b"", sql: asked.sql[query.clone()].as_bytes(), types }.put(&mut lease.out);
            put_sync(&mut lease.out);
            answer(&mut lease, &mut self.client).await
        };
        let taken: std::io::Result<Answer> = asking.await;
        match taken {
            Ok(Ok(())) => Ok(true),
            Ok(Err(complaint)) => {
                let complaint = with_position_behind(&complaint, &asked.sql[..query.start]);
                self.report(&complaint);
                if let Some(txn) = &mut self.txn {
                    txn.failed = true;
                }
                Ok(false)
            }
            Err(error) => {
                lease.doubt("lost while it was asked for a statement's groups");
                Err(lost_shard(&error))
            }
        }
    }
}
