//! One INSERT whose rows belong to several shards: each shard gets the statement with its own rows.
//!
//! Invariant: all of it is parsed by a server first, so that what Postgres has to say of the whole statement is said by
//! Postgres, and nothing is written before; parameters keep their numbers and have the types that the whole statement gives
//! them, also where a part no longer mentions them. Shards take their turns in ascending order, so that sessions which insert the
//! same unique values cannot wait for each other in a circle. Returned rows are held back, within the merge's limit, until
//! their order is known.

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::merge::strip_row_description;
use weir_core::plan::{Dealt, Plan, Returned};
use weir_core::session::replies::{Owed, Replies};
use weir_core::sql::lex::Token;
use weir_wire::backend::{command_rows, tag};
use weir_wire::frame;
use weir_wire::frontend::{Parse, put_sync};
use weir_wire::row;

use super::{OUT_BYTES, Question, Source, with_rows};
use crate::exec::failures::unexpected;
use crate::front::session::{End, Failure, Session};
use crate::statements::{Prepared, relex};

/// What a kept row costs besides its bytes.
const ROW_OVERHEAD_BYTES: usize = 64;

/// An INSERT as the client sent it.
#[derive(Clone, Copy)]
pub struct Whole<'a> {
    /// As a text or as a portal.
    pub question: Question<'a>,
    pub plan: &'a Plan,
    pub dealt: &'a Dealt,
    /// Send the RowDescription.
    pub description: bool,
}

/// How one part is asked.
pub struct Part<'a> {
    pub text: String,
    pub types: &'a [u8],
}

/// What shards have returned so far.
#[derive(Default)]
pub struct Gathered {
    description: Option<Bytes>,
    /// By shard, in the order of shards: rows without what tracks them.
    rows: Vec<Vec<Bytes>>,
    returned: Vec<Returned>,
    bytes: usize,
    pub command: Bytes,
    pub inserted: u64,
}

impl Session {
    /// Runs it everywhere it belongs. Outside a transaction it makes its own, so that it commits everywhere or nowhere.
    pub async fn deal_rows(&mut self, shards: &[ShardId], whole: Whole<'_>) -> Result<(), Failure> {
        let _turn = self.unique_turn(whole.plan).await?;
        let mut types = Vec::new();
        if let Question::Portal { prepared, .. } = whole.question {
            for &shard in shards {
                types.push(self.parameter_types(shard, prepared).await?);
            }
        } else {
            self.check_whole(shards[0], whole.question.sql()).await?;
        }
        relex(whole.question.sql(), &mut self.scratch);
        let tokens = std::mem::take(&mut self.scratch.tokens);
        let own = self.txn.is_none();
        if own {
            self.begin_implicit();
        }
        let result = self.deal_out(shards, whole, &types, &tokens).await;
        self.scratch.tokens = tokens;
        self.conclude_write(own, whole.plan, result).await
    }

    /// Has one server parse the whole text; its error is the client's.
    pub async fn check_whole(&mut self, shard: ShardId, sql: &str) -> Result<(), Failure> {
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        let lease = &mut self.held[index].lease;
        lease.unnamed = None;
        Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut lease.out);
        replies.push(Owed::Parse { hidden: true, op: u32::MAX });
        put_sync(&mut lease.out);
        replies.push(Owed::Sync { hidden: true });
        self.captured(index, &mut replies, &mut []).await.map(|_| ())
    }

    /// The types that a shard gives a statement's parameters: big-endian OIDs, asked once.
    pub async fn parameter_types(&mut self, shard: ShardId, prepared: &Prepared) -> Result<Bytes, Failure> {
        if let Some((_, types)) = prepared.parameter_types.lock().iter().find(|(of, _)| *of == shard) {
            return Ok(types.clone());
        }
        let described = self.describe_on(shard, prepared, true).await?;
        let first = frame::peek(&described, usize::MAX >> 1).ok().flatten();
        let first = first.filter(|first| first.tag == tag::PARAMETER_DESCRIPTION && first.body.len() >= 2);
        let types = Bytes::copy_from_slice(&first.ok_or_else(|| unexpected("no ParameterDescription"))?.body[2..]);
        let mut all = prepared.parameter_types.lock();
        if all.iter().all(|(of, _)| *of != shard) {
            all.push((shard, types.clone()));
        }
        Ok(types)
    }

    async fn deal_out(
        &mut self,
        shards: &[ShardId],
        whole: Whole<'_>,
        types: &[Bytes],
        tokens: &[Token],
    ) -> Result<Bytes, Failure> {
        let Whole { dealt, .. } = whole;
        let tracked = dealt.deal.tracked();
        let mut gathered = Gathered::default();
        for (at, &shard) in shards.iter().enumerate() {
            let owned = |row: usize| dealt.owners.get(row) == Some(&shard);
            let types = types.get(at).map_or(&b""[..], |types| types);
            let part = Part { text: dealt.deal.rows.keep(whole.question.sql(), tokens, owned, &tracked), types };
            self.deal_to(shard, whole, &part, &mut gathered).await?;
        }
        self.put_returned(whole, &gathered).await?;
        Ok(with_rows(&gathered.command, gathered.inserted))
    }

    pub async fn deal_to(
        &mut self,
        shard: ShardId,
        whole: Whole<'_>,
        part: &Part<'_>,
        gathered: &mut Gathered,
    ) -> Result<(), Failure> {
        let tracks = !whole.dealt.deal.tracked().is_empty();
        let question = match whole.question {
            Question::Portal { bind, .. } => {
                Question::Once { sql: &part.text, types: part.types, bind, hidden: usize::from(tracks) }
            }
            _ => Question::Text(&part.text),
        };
        let mut sources = self.ask(&[shard], question).await?;
        self.note_write(sources[0].index, whole.plan, false).await?;
        let gathering = self.gather(&mut sources[0], tracks, whole.dealt, gathered).await;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        let (rows, returned) = gathering?;
        if let Some(body) = sources[0].failed.take() {
            return Err(self.report(&body));
        }
        let command = sources[0].command.take().unwrap_or_default();
        gathered.inserted += command_rows(&command).unwrap_or(0);
        gathered.command = command;
        gathered.returned.push(Returned { shard, ..returned });
        gathered.rows.push(rows);
        Ok(())
    }

    /// Reads one shard's answer to its end or its error.
    async fn gather(
        &mut self,
        source: &mut Source,
        tracks: bool,
        dealt: &Dealt,
        gathered: &mut Gathered,
    ) -> Result<(Vec<Bytes>, Returned), Failure> {
        let bytes_max = self.app.config().limits.merge_bytes_max;
        let mut rows = Vec::new();
        let mut returned = Returned { shard: ShardId(0), rows: 0, hashes: Vec::new() };
        while !source.done {
            let (kind, mut body) = self.next_frame(source).await?;
            match kind {
                tag::NOTICE => frame::put(&mut self.client.out, kind, |out| out.extend_from_slice(&body)),
                tag::ROW_DESCRIPTION => {
                    gathered.description.get_or_insert_with(|| without_tracking(&body, tracks));
                }
                tag::DATA_ROW => {
                    if tracks {
                        let key = row::take_last(&mut body).ok().flatten().unwrap_or_default();
                        returned.hashes.push(dealt.deal.key_hash(&key)?);
                    }
                    returned.rows += 1;
                    gathered.bytes += body.len() + ROW_OVERHEAD_BYTES;
                    if gathered.bytes > bytes_max {
                        return Err(too_many_returned(bytes_max).into());
                    }
                    rows.push(body);
                }
                _ => {}
            }
        }
        Ok((rows, returned))
    }

    /// The rows in the order of VALUES.
    pub async fn put_returned(&mut self, whole: Whole<'_>, gathered: &Gathered) -> Result<(), Failure> {
        let Whole { dealt, description, .. } = whole;
        if !dealt.deal.rows.returning {
            return Ok(());
        }
        if let Some(body) = gathered.description.as_ref().filter(|_| description) {
            frame::put(&mut self.client.out, tag::ROW_DESCRIPTION, |out| out.extend_from_slice(body));
        }
        let order = dealt.order(&gathered.returned)?;
        let mut rows: Vec<_> = gathered.rows.iter().map(|rows| rows.iter()).collect();
        for from in order {
            let Some(body) = rows.get_mut(from).and_then(Iterator::next) else { continue };
            frame::put(&mut self.client.out, tag::DATA_ROW, |out| out.extend_from_slice(body));
            if self.client.out.len() > OUT_BYTES {
                self.client.send().await.map_err(|_| End::ClientGone)?;
            }
        }
        Ok(())
    }
}

fn without_tracking(description: &Bytes, tracks: bool) -> Bytes {
    if !tracks {
        return description.clone();
    }
    let mut stripped = BytesMut::new();
    strip_row_description(description, 1, &mut stripped);
    stripped.freeze()
}

fn too_many_returned(bytes_max: usize) -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::TOO_COMPLEX,
        "the rows that this INSERT returns are too many to put in order",
    )
    .detail(format!("They come from several shards and take more than {bytes_max} bytes (merge_bytes_max)."))
    .hint("Insert fewer rows at a time, or leave RETURNING out.")
}
