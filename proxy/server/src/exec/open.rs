//! Reads over several shards that stay open: portals fetched in parts, and cursors.
//!
//! Invariant: between two fetches no shard is amid an answer, so that the transaction goes on with other statements; each shard
//! keeps its rows in a portal of its own, and at most one batch of each is held here, within the merge's limits. What is open ends
//! with its transaction. Non-goal: going backward.

use bytes::{Buf, Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::merge::{MergeSpec, Merger, Wants};
use weir_core::session::replies::{Owed, Replies};
use weir_core::sql::fetch::Count;
use weir_wire::backend::{PORTAL_SUSPENDED, tag};
use weir_wire::frame;
use weir_wire::frontend::{Execute, Object, Target, put_sync};

use super::failures::{lost_shard, no_common_snapshot};
use super::fan::{Form, OUT_BYTES, Question, Source};
use crate::front::session::{End, Failure, Session, Transaction};

/// Rows a shard is asked for at once.
const BATCH_ROWS: i32 = 128;
/// Reads one transaction may have open.
const OPEN_MAX: usize = 64;

/// Who asks for the rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reader {
    /// A portal of the client's, by its name.
    Portal(Bytes),
    /// A cursor of DECLARE.
    Cursor(String),
}

pub struct OpenRead {
    pub reader: Reader,
    /// What each shard calls its part.
    portal: Bytes,
    shards: Vec<ShardId>,
    /// `None`: all rows are ready.
    merger: Option<Merger>,
    /// The shard has given all its rows.
    ended: Vec<bool>,
    /// RowDescription frame for the client.
    pub description: BytesMut,
    /// DataRow frames that nobody has asked for yet.
    ready: BytesMut,
    /// Length of the transaction's prelude when it was opened, for one whose rows no shard has.
    age: Option<usize>,
}

impl OpenRead {
    /// A read whose rows are all here: their description and they themselves, as frames.
    pub fn kept(reader: Reader, (description, ready): (BytesMut, BytesMut), age: usize) -> Self {
        let (portal, shards, ended) = (Bytes::new(), Vec::new(), Vec::new());
        OpenRead { reader, portal, shards, merger: None, ended, description, ready, age: Some(age) }
    }

    /// Of rows that nobody has asked for yet.
    pub fn bytes(&self) -> usize {
        self.ready.len()
    }

    /// Was it opened behind the savepoint that is the last of so many statements?
    pub fn is_younger(&self, prelude: usize) -> bool {
        self.age.is_some_and(|age| age >= prelude)
    }
}

impl Session {
    /// Opens a portal or cursor on every shard. `form.description` does not matter: nothing is sent to the client.
    pub async fn open_read(
        &mut self,
        shards: &[ShardId],
        (reader, portal): (Reader, Bytes),
        question: Question<'_>,
        spec: MergeSpec,
        form: Form,
    ) -> Result<(), Failure> {
        if self.txn.as_ref().is_some_and(Transaction::keeps_one_shard) {
            return Err(no_common_snapshot().into());
        }
        self.room_for_read()?;
        let mut sources = self.ask(shards, question).await?;
        let description = self.description_of(&mut sources).await;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        let description = description?;
        if let Some(body) = sources.iter_mut().find_map(|source| source.failed.take()) {
            return Err(self.report(&body));
        }
        let (merger, description) = self.merger(description, spec, shards.len(), form)?;
        self.open_reads.retain(|read| read.reader != reader);
        self.open_reads.push(OpenRead {
            reader,
            portal,
            shards: shards.to_vec(),
            merger: Some(merger),
            ended: vec![false; shards.len()],
            description,
            ready: BytesMut::new(),
            age: None,
        });
        Ok(())
    }

    pub fn room_for_read(&self) -> Result<(), UserError> {
        if self.open_reads.len() >= OPEN_MAX { Err(too_many()) } else { Ok(()) }
    }

    async fn description_of(&mut self, sources: &mut [Source]) -> Result<Option<Bytes>, Failure> {
        let mut description = None;
        for source in sources {
            while !source.done {
                let (kind, body) = self.next_frame(source).await?;
                if kind == tag::ROW_DESCRIPTION {
                    description.get_or_insert(body);
                }
            }
        }
        Ok(description)
    }

    /// The next rows, to the client if they are `shown`. Returns how many there were.
    pub async fn fetch_rows(&mut self, reader: &Reader, count: Count, shown: bool) -> Result<u64, Failure> {
        let Some(place) = self.open_reads.iter().position(|read| read.reader == *reader) else { return Ok(0) };
        let mut read = self.open_reads.swap_remove(place);
        let result = self.fetch_from(&mut read, count.unwrap_or(u64::MAX), shown).await;
        self.open_reads.push(read);
        result
    }

    /// What one Execute with a row limit gives of an open read (0: all that is left).
    pub async fn put_part(&mut self, reader: &Reader, rows_max: i32) -> Result<(), Failure> {
        let count: Count = u64::try_from(rows_max).ok().filter(|count| *count > 0);
        let rows = self.fetch_rows(reader, count, true).await?;
        if Some(rows) == count {
            self.client.out.extend_from_slice(PORTAL_SUSPENDED);
        } else {
            self.put_tag(&format!("SELECT {rows}"));
        }
        Ok(())
    }

    async fn fetch_from(&mut self, read: &mut OpenRead, count: u64, shown: bool) -> Result<u64, Failure> {
        let mut given = 0;
        loop {
            while given < count
                && let Ok(Some((_, total))) = frame::header(&read.ready, usize::MAX >> 1)
            {
                if shown {
                    self.client.out.extend_from_slice(&read.ready[..total]);
                }
                read.ready.advance(total);
                given += 1;
            }
            if self.client.out.len() > OUT_BYTES {
                self.client.send().await.map_err(|_| End::ClientGone)?;
            }
            let Some(merger) = read.merger.as_mut().filter(|merger| given < count && !merger.done()) else {
                return Ok(given);
            };
            let next = match merger.wants() {
                Wants::One(number) => Some(number),
                Wants::All => read.ended.iter().position(|ended| !ended),
                Wants::Nothing => None,
            };
            if let Some(number) = next {
                self.more_rows(read, number).await?;
            }
            if let Some(merger) = &mut read.merger {
                merger.poll(&mut read.ready)?;
            }
        }
    }

    /// One batch of one shard.
    async fn more_rows(&mut self, read: &mut OpenRead, number: usize) -> Result<(), Failure> {
        let index = self.hold(read.shards[number]).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        let lease = &mut self.held[index].lease;
        Execute { portal: &read.portal, rows_max: BATCH_ROWS }.put(&mut lease.out);
        put_sync(&mut lease.out);
        replies.push(Owed::Execute);
        replies.push(Owed::Sync { hidden: false });
        lease.busy = true;
        self.cancel.slot.begin(&lease.cancel_key);
        lease.send().await.map_err(|error| lost_shard(&error))?;
        let mut sources = [Source { index, replies, done: false, failed: None, command: None }];
        let mut pushed = Ok(());
        while !sources[0].done {
            let (kind, body) = self.next_frame(&mut sources[0]).await?;
            match kind {
                tag::DATA_ROW if pushed.is_ok() => {
                    pushed = read.merger.as_mut().map_or(Ok(()), |merger| merger.push(number, &body));
                }
                tag::NOTICE => self.client.put_aside(kind, &body),
                _ => {}
            }
        }
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        if let Some(body) = sources[0].failed.take() {
            return Err(self.report(&body));
        }
        pushed?;
        if sources[0].command.is_some() {
            read.ended[number] = true;
            if let Some(merger) = &mut read.merger {
                merger.finish(number);
            }
        }
        Ok(())
    }

    /// Ends what is open under that name; the shards' portals, too, while the transaction goes on.
    pub async fn close_read(&mut self, reader: &Reader) -> Result<bool, Failure> {
        if let Reader::Portal(name) = reader {
            self.read_portals.retain(|read| read != name);
        }
        let Some(place) = self.open_reads.iter().position(|read| read.reader == *reader) else { return Ok(false) };
        let read = self.open_reads.swap_remove(place);
        if self.txn.as_ref().is_none_or(|txn| txn.failed) {
            return Ok(true);
        }
        for &shard in &read.shards {
            let index = self.hold(shard).await?;
            let mut replies = Replies::default();
            self.prime(index, &mut replies);
            let lease = &mut self.held[index].lease;
            Target { object: Object::Portal, name: &read.portal }.put(weir_wire::frontend::tag::CLOSE, &mut lease.out);
            put_sync(&mut lease.out);
            replies.push(Owed::Close { hidden: true, op: u32::MAX });
            replies.push(Owed::Sync { hidden: false });
            lease.busy = true;
            self.cancel.slot.begin(&lease.cancel_key);
            lease.send().await.map_err(|error| lost_shard(&error))?;
            let mut sources = [Source { index, replies, done: false, failed: None, command: None }];
            self.drain(&mut sources).await?;
        }
        Ok(true)
    }

    pub fn has_open(&self, reader: &Reader) -> bool {
        self.open_reads.iter().any(|read| read.reader == *reader)
    }
}

fn too_many() -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "too many open reads over several shards")
        .detail(format!("This transaction has {OPEN_MAX} cursors and half-read portals open."))
        .hint("Close some of them.")
}
