//! COPY over several shards: one stream of the client to or from all of them.
//!
//! Invariant: rows of a sharded table go to the shard of their key, in order; what is held back is bounded, so that a slow
//! shard slows the client down. An error is told with the client's own line number. Whichever way a copy ends, all shards end
//! it. Non-goals: finding rows and keys (`weir_core::copy`), and commit ([`super::commit`]).

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use bytes::{Buf, Bytes, BytesMut};
use smallvec::SmallVec;
use weir_core::copy::{Joiner, Layout, Options, Splitter, context_with_line, is_utf8};
use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::plan::Plan;
use weir_core::session::replies::Owed;
use weir_wire::backend::{command_rows, report_field, tag, with_report_field};
use weir_wire::frame;
use weir_wire::frontend::{self, put_copy_fail, put_sync};

use super::failures::{lost_shard, no_common_snapshot, not_utf8, unexpected};
use super::fan::{OUT_BYTES, Question, Source, with_rows};
use crate::back::conn::MESSAGE_BYTES_MAX;
use crate::front::session::{End, Failure, Session, Transaction};

/// What the shards are told that had no error of their own.
const CALLED_OFF: &str = "another shard refused";

/// How the client's data came to its end.
enum Ended {
    Done,
    /// The client's own CopyFail, as it came.
    Given(BytesMut),
    /// A row that has no place; `last`: there is nothing behind it.
    Misfit {
        error: UserError,
        last: bool,
    },
    /// A shard has refused a row.
    Refused,
}

/// What there is to do next.
enum News {
    /// More of the client's data.
    Data,
    ClientGone,
    /// This source has something to say.
    Shard(usize),
}

impl Session {
    /// COPY … FROM STDIN of a sharded table. Returns the command tag.
    pub async fn copy_in(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        plan: &Plan,
        layout: &Arc<Layout>,
    ) -> Result<Bytes, Failure> {
        let encoding = self.vars.current().get("client_encoding");
        if layout.options.encoding.is_none() && encoding.is_some_and(|name| !is_utf8(name)) {
            return Err(not_utf8().into());
        }
        let mut sources = self.ask(shards, question).await?;
        for source in &sources {
            self.note_write(source.index, plan, false).await?;
        }
        let row_bytes_max = self.app.config().limits.message_bytes_max;
        let mut splitter = Splitter::new(Arc::clone(layout), shards, &self.view().topology.slots, row_bytes_max);
        let own_error = self.copy_parts(&mut sources, &mut splitter).await?;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        if let Some(body) = first_failure(&mut sources, &splitter, own_error.is_some()) {
            return Err(self.report(&body));
        }
        if let Some(error) = own_error {
            self.fail(&error);
            return Err(Failure::Reported);
        }
        let commands: Vec<&Bytes> = sources.iter().filter_map(|source| source.command.as_ref()).collect();
        let rows = commands.iter().filter_map(|command| command_rows(command)).sum();
        Ok(commands.first().map_or_else(Bytes::new, |command| with_rows(command, rows)))
    }

    /// From the shards' CopyInResponse to the end of the client's data. Returns weir's own reason to refuse it.
    async fn copy_parts(
        &mut self,
        sources: &mut [Source],
        splitter: &mut Splitter,
    ) -> Result<Option<UserError>, Failure> {
        let mut response = None;
        while response.is_none() && !sources[0].done && sources[0].failed.is_none() {
            let (kind, body) = self.next_frame(&mut sources[0]).await?;
            match kind {
                tag::COPY_IN => response = Some(body),
                tag::NOTICE => self.client.put_aside(kind, &body),
                _ => {}
            }
        }
        let Some(response) = response else {
            self.call_off_copy(sources).await?;
            return Ok(None);
        };
        if !self.all_listen(sources).await? {
            self.call_off_copy(sources).await?;
            return Ok(None);
        }
        frame::put(&mut self.client.out, tag::COPY_IN, |out| out.extend_from_slice(&response));
        self.copied_in = true;
        self.client.send().await.map_err(|_| End::ClientGone)?;
        let (ended, left) = self.hand_out(sources, splitter).await?;
        self.skip_data(left).await?;
        for (part, source) in sources.iter_mut().enumerate() {
            if source.failed.is_none() {
                let out = &mut self.held[source.index].lease.out;
                match &ended {
                    // It has been given the row, and what it says of it may depend on this being all.
                    Ended::Misfit { last: true, .. } if part == 0 => {
                        frame::put(out, frontend::tag::COPY_DONE, |_| {});
                    }
                    Ended::Done => frame::put(out, frontend::tag::COPY_DONE, |_| {}),
                    Ended::Given(message) => out.extend_from_slice(message),
                    Ended::Misfit { .. } | Ended::Refused => put_copy_fail(out, CALLED_OFF),
                }
            }
            self.end_copy(source).await?;
        }
        Ok(match ended {
            Ended::Misfit { error, .. } => Some(error),
            _ => None,
        })
    }

    /// Passes the client's data on until it ends, one way or the other. Also returns how much of a message is left.
    async fn hand_out(&mut self, sources: &mut [Source], splitter: &mut Splitter) -> Result<(Ended, usize), Failure> {
        let mut left = 0;
        loop {
            if let Some(ended) = self.split_received(sources, splitter, &mut left)? {
                return Ok((ended, left));
            }
            match self.copy_news(sources).await {
                News::Data => {}
                News::ClientGone => return Err(End::ClientGone.into()),
                News::Shard(number) => {
                    let (kind, body) = self.next_frame(&mut sources[number]).await?;
                    match kind {
                        tag::ERROR => return Ok((Ended::Refused, left)),
                        tag::NOTICE => self.client.put_aside(kind, &body),
                        _ => {}
                    }
                }
            }
        }
    }

    /// Splits all that has been received. `left`: bytes of the message in hand that are still to come.
    fn split_received(
        &mut self,
        sources: &[Source],
        splitter: &mut Splitter,
        left: &mut usize,
    ) -> Result<Option<Ended>, Failure> {
        loop {
            if *left > 0 {
                let step = (*left).min(self.client.inbuf.len());
                if step == 0 {
                    return Ok(None);
                }
                *left -= step;
                let chunk = self.client.inbuf.split_to(step);
                if let Err(error) = self.put_parts(sources, |sink| splitter.push(&chunk, sink)) {
                    return Ok(Some(Ended::Misfit { error, last: false }));
                }
                continue;
            }
            let header = frame::header(&self.client.inbuf, MESSAGE_BYTES_MAX)
                .map_err(|_| unexpected("a malformed copy message"))?;
            let Some((kind, total)) = header else { return Ok(None) };
            if kind == frontend::tag::COPY_DATA {
                self.client.inbuf.advance(frame::HEADER);
                *left = total - frame::HEADER;
                continue;
            }
            if self.client.inbuf.len() < total {
                return Ok(None);
            }
            let message = self.client.inbuf.split_to(total);
            match kind {
                frontend::tag::SYNC | frontend::tag::FLUSH => {}
                frontend::tag::COPY_FAIL => return Ok(Some(Ended::Given(message))),
                frontend::tag::COPY_DONE => {
                    let finished = self.put_parts(sources, |sink| splitter.finish(sink));
                    let misfit = |error| Ended::Misfit { error, last: true };
                    return Ok(Some(finished.map_or_else(misfit, |()| Ended::Done)));
                }
                _ => return Err(unexpected("a message that is no part of COPY")),
            }
        }
    }

    /// Runs a step of the splitter; what it hands to a part becomes one CopyData message for that shard.
    fn put_parts(
        &mut self,
        sources: &[Source],
        step: impl FnOnce(&mut dyn FnMut(usize, &[u8])) -> Result<(), UserError>,
    ) -> Result<(), UserError> {
        let held = &mut self.held;
        let mut starts: SmallVec<[Option<usize>; 8]> = SmallVec::from_elem(None, sources.len());
        let result = step(&mut |part, row| {
            let out = &mut held[sources[part].index].lease.out;
            if starts[part].is_none() {
                starts[part] = Some(out.len());
                out.extend_from_slice(&[frontend::tag::COPY_DATA, 0, 0, 0, 0]);
            }
            out.extend_from_slice(row);
        });
        for (source, start) in sources.iter().zip(starts) {
            let Some(start) = start else { continue };
            let out = &mut held[source.index].lease.out;
            let length = (out.len() - start - 1) as u32;
            out[start + 1..start + frame::HEADER].copy_from_slice(&length.to_be_bytes());
        }
        result
    }

    /// Sends what the shards can take, and waits for something to do. Cancel-safe: nothing is taken from any stream but into
    /// its own buffer.
    async fn copy_news(&mut self, sources: &[Source]) -> News {
        let Session { client, held, .. } = self;
        poll_fn(|cx| {
            let mut room = true;
            for (number, source) in sources.iter().enumerate() {
                let lease = &mut held[source.index].lease;
                if matches!(lease.poll_send(cx), Poll::Ready(Err(_))) || lease.poll_has_frame(cx).is_ready() {
                    return Poll::Ready(News::Shard(number));
                }
                room &= lease.out.len() < OUT_BYTES;
            }
            if client.has_unsent() && matches!(client.poll_send(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(News::ClientGone);
            }
            if !room {
                return Poll::Pending;
            }
            client.poll_receive(cx).map(|received| match received {
                Ok(0) | Err(_) => News::ClientGone,
                Ok(_) => News::Data,
            })
        })
        .await
    }

    /// The copy has ended amid a message: the rest of it is read and forgotten.
    async fn skip_data(&mut self, mut left: usize) -> Result<(), Failure> {
        while left > 0 {
            if self.client.inbuf.is_empty() && !matches!(self.client.receive().await, Ok(1..)) {
                return Err(End::ClientGone.into());
            }
            let step = left.min(self.client.inbuf.len());
            self.client.inbuf.advance(step);
            left -= step;
        }
        Ok(())
    }

    /// COPY … TO STDOUT of rows on several shards, one shard after the other.
    pub async fn copy_out(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        options: &Options,
    ) -> Result<(), Failure> {
        if self.txn.as_ref().is_some_and(Transaction::keeps_one_shard) {
            return Err(no_common_snapshot().into());
        }
        let mut sources = self.ask(shards, question).await?;
        let outcome = self.join_copies(&mut sources, options).await;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        let rows = outcome?;
        if let Some(body) = sources.iter_mut().find_map(|source| source.failed.take()) {
            return Err(self.report(&body));
        }
        frame::put(&mut self.client.out, tag::COPY_DONE, |_| {});
        self.put_tag(&format!("COPY {rows}"));
        Ok(())
    }

    /// Returns how many rows have gone out; stops at the first error of a shard.
    async fn join_copies(&mut self, sources: &mut [Source], options: &Options) -> Result<u64, Failure> {
        let mut joiner = Joiner::new(options, sources.len());
        let mut rows = 0;
        for (number, source) in sources.iter_mut().enumerate() {
            while !source.done {
                let (kind, body) = self.next_frame(source).await?;
                match kind {
                    tag::COPY_OUT if number == 0 => {
                        frame::put(&mut self.client.out, kind, |out| out.extend_from_slice(&body));
                    }
                    tag::COPY_DATA => {
                        let passed = joiner.message(&body);
                        if !passed.is_empty() || body.is_empty() {
                            frame::put(&mut self.client.out, kind, |out| out.extend_from_slice(&body[passed]));
                        }
                    }
                    tag::NOTICE => self.client.put_aside(kind, &body),
                    tag::ERROR => return Ok(rows),
                    _ => {}
                }
                if self.client.out.len() > OUT_BYTES {
                    self.client.send().await.map_err(|_| End::ClientGone)?;
                }
            }
            rows += source.command.as_ref().and_then(|command| command_rows(command)).unwrap_or(0);
            joiner.next_part();
        }
        Ok(rows)
    }

    /// Waits until every source but the first asks for COPY data, too. False: one of them failed instead.
    pub async fn all_listen(&mut self, sources: &mut [Source]) -> Result<bool, Failure> {
        for source in &mut sources[1..] {
            while !source.replies.copying_in() {
                if source.done || source.failed.is_some() {
                    return Ok(false);
                }
                self.next_frame(source).await?;
            }
        }
        Ok(true)
    }

    /// Ends a COPY that not every shard accepts, before the client has sent anything.
    pub async fn call_off_copy(&mut self, sources: &mut [Source]) -> Result<(), Failure> {
        for source in sources.iter_mut().filter(|source| source.replies.copying_in()) {
            put_copy_fail(&mut self.held[source.index].lease.out, CALLED_OFF);
            self.end_copy(source).await?;
        }
        // The shard that refused says why; the others only say that they were called off.
        let refusal = sources.iter().find_map(|source| source.failed.clone());
        for source in sources.iter_mut() {
            while !source.done {
                self.next_frame(source).await?;
            }
            source.failed.clone_from(&refusal);
        }
        Ok(())
    }

    /// Sends what is in `out`, which ends a COPY, and asks for the ReadyForQuery that is due now.
    async fn end_copy(&mut self, source: &mut Source) -> Result<(), Failure> {
        let lease = &mut self.held[source.index].lease;
        source.replies.copy_ended();
        // In the extended protocol the server has ignored the Sync that was sent along with Execute.
        if !source.replies.owes_ready() {
            put_sync(&mut lease.out);
            source.replies.push(Owed::Sync { hidden: false });
        }
        lease.send().await.map_err(|error| lost_shard(&error))
    }

    /// Hands the client's COPY data to all sources alike.
    pub async fn copy_to_all(&mut self, sources: &mut [Source]) -> Result<(), Failure> {
        self.client.send().await.map_err(|_| End::ClientGone)?;
        loop {
            let header = frame::header(&self.client.inbuf, self.app.config().limits.message_bytes_max)
                .map_err(|_| unexpected("a malformed copy message"))?;
            let Some((kind, total)) = header.filter(|(_, total)| self.client.inbuf.len() >= *total) else {
                match self.client.receive().await {
                    Ok(0) | Err(_) => return Err(End::ClientGone.into()),
                    Ok(_) => continue,
                }
            };
            let message = self.client.inbuf.split_to(total);
            match kind {
                frontend::tag::SYNC | frontend::tag::FLUSH => continue,
                frontend::tag::COPY_DATA | frontend::tag::COPY_DONE | frontend::tag::COPY_FAIL => {}
                _ => return Err(unexpected("a message that is no part of COPY")),
            }
            for source in sources.iter_mut() {
                let lease = &mut self.held[source.index].lease;
                lease.out.extend_from_slice(&message);
                if kind == frontend::tag::COPY_DATA {
                    lease.send().await.map_err(|error| lost_shard(&error))?;
                } else {
                    self.end_copy(source).await?;
                }
            }
            self.copied_in = true;
            if kind != frontend::tag::COPY_DATA {
                return Ok(());
            }
        }
    }
}

/// The error that one Postgres would have met first, with the client's line number. `called_off`: only what a shard has against
/// a row counts.
fn first_failure(sources: &mut [Source], splitter: &Splitter, called_off: bool) -> Option<Bytes> {
    let mut first: Option<(u64, Bytes)> = None;
    let mut others = None;
    for (part, source) in sources.iter_mut().enumerate() {
        let Some(body) = source.failed.take() else { continue };
        let message = report_field(&body, b'M').unwrap_or_default();
        if message.ends_with(CALLED_OFF.as_bytes()) && report_field(&body, b'C') == Some(b"57014") {
            others = others.or(Some(body));
            continue;
        }
        let (line, body) = in_clients_lines(body, part, splitter);
        if first.as_ref().is_none_or(|(earlier, _)| line < *earlier) {
            first = Some((line, body));
        }
    }
    first.map(|(_, body)| body).or_else(|| others.filter(|_| !called_off))
}

/// A server's error with its line number made the client's.
fn in_clients_lines(body: Bytes, part: usize, splitter: &Splitter) -> (u64, Bytes) {
    let context = report_field(&body, b'W').and_then(|context| std::str::from_utf8(context).ok()).unwrap_or_default();
    let renumber = |own| splitter.client_line(part, own);
    match context_with_line(context, &splitter.layout().table, renumber) {
        Some((context, line)) => (line, with_report_field(&body, b'W', context.as_bytes())),
        None => (u64::MAX, body),
    }
}
