//! Reads that the fallback engine answers: Postgres on the hub, which sees the rows of all shards.
//!
//! Invariant: each statement has a transaction of its own there, also inside a transaction of the client's, because postgres_fdw
//! keeps one snapshot of each shard per transaction, and READ COMMITTED promises what was committed before each statement. The
//! transaction begins with a look at the engine's token, and ends as soon as the rows have been passed on; the Backend goes back at
//! once. What the client's own transaction has written cannot be seen from there, so then the planner's refusal stands.
//! A replica of the hub, where there is one, is asked first; whatever goes wrong there before the client has been sent anything, the
//! primary is asked as if there were none.
//! Non-goals: bringing the engine into step ([`crate::engine`]), and reads in parts (`kept.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::plan::{Plan, RouteReason, Template};
use weir_core::session::pin::Pin;
use weir_core::session::replies::Replies;
use weir_core::session::vars::replay;
use weir_core::sql::class::Class;
use weir_core::sql::lex::lex;
use weir_core::sql::word;

use super::commit::answer;
use super::copied::{Copied, lost_engine};
use super::failures::no_common_snapshot;
use super::fan::{OUT_BYTES, Question, put_question};
use super::kept::Kept;
use super::limits::{Bounds, without_error};
use super::open::Reader;
use super::own_types::with_own_types;
use super::relay::{Capture, Flow, Trail};
use super::ungrouped::Complaint;
use crate::engine::{Asker, ENGINE, Engine, HubServer, Problem, Ready};
use crate::front::names::Portal;
use crate::front::session::{End, Failure, Session, Transaction};
use crate::hot::Given;

/// Held back at a time, so that the engine's complaints can be told in weir's words; its first ones before anything is sent.
const HELD_BYTES_MAX: usize = 64 * 1024;
/// Attempts to get a Backend that is alive and in step.
const ATTEMPTS: u32 = 3;
/// Columns that are put into GROUP BY, one try for each.
const EDITS_MAX: usize = 32;
const NO_PRIMARY_KEYS: &str = "tables have no primary keys there, by which a column outside GROUP BY could be known";

/// What the client asked, besides the statement itself.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub question: Question<'a>,
    pub sql: &'a str,
    /// Send the RowDescription.
    pub description: bool,
    /// The text is not the client's any more.
    edited: bool,
}

impl<'a> Asked<'a> {
    pub fn text(sql: &'a str) -> Self {
        Asked { question: Question::Text(sql), sql, description: true, edited: false }
    }

    /// A text that the client has bound to values.
    pub fn once(sql: &'a str, portal: &'a Portal) -> Self {
        let (types, bind) = (&*portal.prepared.types, &portal.bind);
        Asked { question: Question::Once { sql, types, bind, hidden: 0 }, sql, description: true, edited: false }
    }

    fn explains(&self) -> bool {
        let mut tokens = Vec::new();
        lex(self.sql, &mut tokens).is_ok() && tokens.first().is_some_and(|token| token.is_word(self.sql, "explain"))
    }

    /// The same with another text.
    fn with(self, sql: &'a str) -> Self {
        let question = match self.question {
            Question::Portal { prepared, bind, .. } => Question::Once { sql, types: &prepared.types, bind, hidden: 0 },
            _ => Question::Text(sql),
        };
        Asked { question, sql, edited: true, ..self }
    }
}

/// How the engine asks the shards. Together is quicker, but postgres_fdw (15.18 and before) fails with 08006, "another command
/// is already in progress", where a scan of several shards ends early and another one of the same server follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scans {
    Together,
    OneByOne,
}

/// How a statement is to run.
#[derive(Clone, Copy)]
struct Way<'a> {
    plan: &'a Plan,
    scans: Scans,
    /// The hub's replicas may be asked.
    replicas: bool,
}

/// A statement's place on the engine.
pub struct Open {
    /// Of its Backend among those that are held.
    pub index: usize,
    ready: Arc<Ready>,
    server: HubServer,
}

/// What became of a statement on the engine.
#[derive(PartialEq, Eq, Debug)]
enum Run {
    Done,
    /// A replica could not, and nothing was sent to the client: the primary is to be asked.
    NotThere,
    /// Nothing was sent to the client: it is worth asking with [`Scans::OneByOne`].
    Again,
    /// Nothing was sent: it may be asked with this column in GROUP BY.
    Ungrouped(Complaint),
}

impl Session {
    pub async fn engine_text(&mut self, sql: &str, class: &Class, plan: &Plan) -> Result<(), Failure> {
        if let Class::Declare { name, .. } = class {
            return self.engine_cursor(name, (sql, None), plan).await;
        }
        self.engine_read(Asked::text(sql), plan, &mut None).await
    }

    pub async fn engine_portal(
        &mut self,
        (name, rows_max): (&Bytes, i32),
        portal: &Portal,
        plan: &Plan,
    ) -> Result<(), Failure> {
        let prepared = &portal.prepared;
        if prepared.type_oids().into_iter().any(|oid| oid >= FIRST_OWN_OID) {
            return Err(
                cannot(plan, "a parameter is declared as a type of your own, which has another number there").into()
            );
        }
        let question = Question::Portal { prepared, bind: &portal.bind, merged: false };
        let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default();
        if let Class::Declare { name, .. } = &prepared.shape.class {
            return self.engine_cursor(name, (sql, Some(portal)), plan).await;
        }
        let asked = Asked { question, sql, description: false, edited: false };
        if matches!(prepared.shape.class, Class::Copy(_)) {
            // Its rows are no answer to Execute, whose limit does not count them.
            return self.engine_read(asked, plan, &mut None).await;
        }
        if rows_max == 0 && !self.has_open(&Reader::Portal(name.clone())) {
            let explains = matches!(prepared.shape.class, Class::Explain { .. });
            if !explains && self.read_portals.contains(name) {
                self.put_tag("SELECT 0");
                return Ok(());
            }
            self.engine_read(asked, plan, &mut None).await?;
            self.read_portals.push(name.clone());
            return Ok(());
        }
        self.engine_part((name, rows_max), asked, plan).await
    }

    /// A query whose rows are weir's.
    pub async fn engine_rows(&mut self, question: Question<'_>, plan: &Plan) -> Result<(), Failure> {
        self.engine_read(Asked { question, sql: question.sql(), description: true, edited: false }, plan, &mut None)
            .await
    }

    /// What becomes of a statement that could not be merged after all, with no byte of a reply sent. `None`: it is done.
    pub fn second_try(
        &self,
        done: Result<(), Failure>,
        reply_before: usize,
        template: &Template,
    ) -> Result<Option<Plan>, Failure> {
        match done {
            Ok(()) => Ok(None),
            Err(Failure::Refused(refusal)) if self.client.out.len() == reply_before => {
                Ok(Some(self.db.plan_refused(template, refusal)?))
            }
            Err(failure) => Err(failure),
        }
    }

    /// `kept`: where the rows go instead of to the client.
    pub async fn engine_read(&mut self, asked: Asked<'_>, plan: &Plan, kept: &mut Option<Kept>) -> Result<(), Failure> {
        let db = Arc::clone(&self.db);
        let Some(engine) = &db.engine else { return Err(cannot(plan, "there is none").into()) };
        self.engine_fits(plan)?;
        self.stats.sent_to(plan, self.view().topology.home, Given::Unknown);
        let (mut way, mut edited) = (Way { plan, scans: Scans::Together, replicas: true }, None::<String>);
        let (mut edits, settings) = (0, self.vars.current().clone());
        let mut asker = self.asker(&asked);
        while edits <= EDITS_MAX {
            let open = self.open_engine(engine, asked.sql, &mut way).await?;
            if edited.is_none() {
                asker.token.clone_from(&open.ready.token);
                edited = engine.mended.find(&asker, &settings);
            }
            let asked = edited.as_deref().map_or(asked, |sql| asked.with(sql));
            let done = self.run_on_engine(&open, (&asked, &mut *kept), way, engine).await;
            if let Err(Failure::End(_)) = done {
                return done.map(drop);
            }
            // What failed may be prepared there or not.
            let unsure = !matches!(done, Ok(Run::Done)) && matches!(asked.question, Question::Portal { .. });
            self.close_engine(unsure).await;
            match done? {
                Run::Done => {
                    if edits > 0 && open.ready.token == asker.token {
                        engine.mended.keep(asker, settings, asked.sql);
                    }
                    return Ok(());
                }
                Run::NotThere => {
                    tracing::debug!("a replica of the hub could not run a statement; the primary is asked");
                    way.replicas = false;
                }
                Run::Again => way.scans = Scans::OneByOne,
                Run::Ungrouped(complaint) => {
                    edits += 1;
                    if !asked.edited && !self.home_takes(&asked, plan).await? {
                        return Err(Failure::Reported);
                    }
                    let mended = complaint.mended(asked.sql).filter(|_| edits <= EDITS_MAX);
                    edited = Some(mended.ok_or_else(|| cannot(plan, NO_PRIMARY_KEYS))?);
                }
            }
        }
        Err(cannot(plan, NO_PRIMARY_KEYS).into())
    }

    /// Who asks what, for what is known of the statement; its token is still to come.
    fn asker(&self, asked: &Asked<'_>) -> Asker {
        let types: &[u8] = match &asked.question {
            Question::Portal { prepared, .. } => &prepared.types,
            Question::Once { types, .. } => types,
            _ => &[],
        };
        let (view_version, user) = (self.view().version, Arc::clone(&self.user));
        Asker { view_version, token: String::new(), user, sql: asked.sql.into(), types: types.into() }
    }

    /// May this session's transaction ask it?
    fn engine_fits(&self, plan: &Plan) -> Result<(), UserError> {
        if self.txn.as_ref().is_some_and(Transaction::keeps_one_shard) {
            return Err(no_common_snapshot());
        }
        if self.sees_all_shards() {
            let why = "this transaction sees all shards as at one moment, and the engine would see another one";
            return Err(cannot(plan, why).hint("Use a READ COMMITTED transaction."));
        }
        if self.txn.is_some() && self.held.iter().any(|held| held.changed) {
            let why = "this transaction has written, and what it wrote cannot be seen from there before it commits";
            return Err(cannot(plan, why).hint("Run the statement before the first write, or after COMMIT."));
        }
        // What such a session carries may change what its statements mean, and is known to one connection only.
        let carries = |pin: &Pin| match pin {
            Pin::TempTable | Pin::SetConfig | Pin::SetInsideUncertainTransaction => true,
            Pin::LoadedLibrary | Pin::Function | Pin::Unparsed => true,
            Pin::AdvisoryLock | Pin::HoldCursor | Pin::SqlPrepare | Pin::Listen | Pin::SequenceState => false,
            Pin::RandomSeed | Pin::Dblink | Pin::SessionMode => false,
        };
        if let Some(pin) = self.held.iter().filter_map(|held| held.pinned).find(carries) {
            return Err(cannot(plan, &format!("this session carries state of another server ({})", pin.as_str())));
        }
        Ok(())
    }

    async fn step_in(&self, engine: &Engine, plan: &Plan) -> Result<Arc<Ready>, UserError> {
        engine.ready(&self.db).await.map_err(|problem| match problem {
            Problem::Unreachable(why) => {
                UserError::new(Blame::Server, CANNOT_CONNECT_NOW, "the fallback engine on the hub cannot be reached")
                    .detail(format!("{} {why}.", wanted_for(plan)))
                    .hint("Statements with a shard key do not need it. SHOW ENGINE in the admin database says more.")
            }
            problem => cannot(plan, &problem.to_string()),
        })
    }

    /// A Backend in a transaction of its own, with the engine as it was found ready.
    async fn open_engine(&mut self, engine: &Engine, sql: &str, way: &mut Way<'_>) -> Result<Open, Failure> {
        let plan = way.plan;
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            let ready = self.step_in(engine, plan).await?;
            if let Some(skipped) = skipped_in(sql, &ready) {
                return Err(cannot(plan, &skipped).into());
            }
            if way.replicas {
                if let Some(open) = self.open_on_replica(engine, &ready, way.scans).await? {
                    return Ok(open);
                }
                way.replicas = false;
            }
            attempts += 1;
            let index = self.hold(ENGINE).await?;
            let begun = self.begin_on_engine(index, (engine, way.scans), &ready).await;
            match begun {
                // It may have waited for the connection, and leaves out the guests of its own epoch.
                Ok(Ok(())) if ready.epoch != self.db.view().topology.epoch => self.close_engine(false).await,
                Ok(Ok(())) => return Ok(Open { index, ready, server: HubServer::Primary }),
                Ok(Err(refusal)) => {
                    tracing::debug!("the fallback engine is not in step: {}", String::from_utf8_lossy(&refusal));
                    self.close_engine(false).await;
                    engine.note_stale();
                }
                Err(_) => {
                    self.held[index].lease.doubt("lost before the fallback engine was asked");
                    self.held[index].lease.pool().close_idle();
                    self.held.remove(index);
                }
            }
        }
        Err(cannot(plan, "it is being brought into step with the shards").into())
    }

    /// The same on a replica of the hub. `None`: the primary is to be asked.
    ///
    /// The look at the token takes the same lock as on the primary (ACCESS SHARE, which a hot standby grants), and it does the same:
    /// a rebuild's ACCESS EXCLUSIVE lock is in the WAL ahead of what it drops, so replay waits for the statement, or ends it with 40001
    /// after max_standby_streaming_delay; it never takes a table from under it.
    async fn open_on_replica(
        &mut self,
        engine: &Engine,
        ready: &Arc<Ready>,
        scans: Scans,
    ) -> Result<Option<Open>, Failure> {
        let pools = Arc::clone(&self.pools);
        let Some(of_engine) = &pools.engine else { return Ok(None) };
        let server = engine.choose(&ready.token, |server| of_engine.have_room(server));
        let HubServer::Replica(number) = server else { return Ok(None) };
        let replica = &engine.replicas[number];
        let lease = match self.lease_from(of_engine.of(server)).await {
            Ok(lease) => lease,
            Err(cancelled) if cancelled.sqlstate == sqlstate::QUERY_CANCELED => return Err(cancelled.into()),
            Err(error) => {
                tracing::debug!(replica = %replica.endpoint, "no connection to the hub's replica: {}", error.message);
                replica.doubt();
                return Ok(None);
            }
        };
        let index = self.hold_lease(ENGINE, lease);
        let in_force = engine.confirm.is_in_force(&ready.token);
        let (begun, in_force) = tokio::join!(self.begin_on_engine(index, (engine, scans), ready), in_force);
        let why = match begun {
            Ok(Ok(())) if in_force && ready.epoch == self.db.view().topology.epoch => {
                replica.asked.fetch_add(1, Relaxed);
                return Ok(Some(Open { index, ready: Arc::clone(ready), server }));
            }
            Ok(Ok(())) => "the primary shows another build".to_owned(),
            Ok(Err(refusal)) => {
                replica.doubt();
                String::from_utf8_lossy(&refusal).into_owned()
            }
            Err(error) => {
                replica.doubt();
                self.held[index].lease.doubt("lost before the fallback engine was asked");
                self.held[index].lease.pool().close_idle();
                error.to_string()
            }
        };
        tracing::debug!(replica = %replica.endpoint, "the hub's replica is not asked: {why}");
        self.close_engine(false).await;
        Ok(None)
    }

    async fn begin_on_engine(
        &mut self,
        index: usize,
        (engine, scans): (&Engine, Scans),
        ready: &Ready,
    ) -> std::io::Result<Result<(), Bytes>> {
        let wanted = self.vars.current().clone();
        let begin = match &self.txn {
            Some(txn) => txn.prelude.iter().map(|joined| &*joined.sql).collect::<Vec<_>>().join("; "),
            None => "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY".to_owned(),
        };
        let begin = if begin.is_empty() { "BEGIN".to_owned() } else { begin };
        // Its own bound of time holds however long the client would let it run.
        let check = format!(
            "SELECT pg_catalog.set_config('statement_timeout', CASE WHEN t.ms > 0 AND t.ms < {max} THEN t.ms ELSE {max} END::text, true), \
             pg_catalog.set_config('enable_async_append', '{}', true), 1 / CASE WHEN (SELECT s.token FROM weir_engine.state s) = '{}' THEN 1 ELSE 0 END \
             FROM (SELECT pg_catalog.round(extract(epoch FROM pg_catalog.current_setting('statement_timeout')::interval) * 1000)::bigint AS ms) t",
            if scans == Scans::Together { "on" } else { "off" },
            ready.token,
            max = engine.config.time_max.as_millis(),
        );
        let Session { client, held, .. } = self;
        let lease = &mut held[index].lease;
        let settings = replay(&lease.vars, &wanted);
        for sql in settings.iter().map(String::as_str).chain([&*begin, &*check]) {
            lease.put_query(sql);
            if let Err(refusal) = answer(lease, client).await? {
                return Ok(Err(refusal));
            }
            lease.vars.clone_from(&wanted);
        }
        Ok(Ok(()))
    }

    async fn run_on_engine(
        &mut self,
        open: &Open,
        (asked, kept): (&Asked<'_>, &mut Option<Kept>),
        Way { plan, scans, .. }: Way<'_>,
        engine: &Engine,
    ) -> Result<Run, Failure> {
        let index = open.index;
        let mut bounds = Bounds { plan, engine, start: Instant::now(), rows: engine.config.rows_max };
        let mut replies = Replies::default();
        let untold = match self.look_at_copied(open, asked, plan).await? {
            Copied::Fits => false,
            Copied::Unknown => true,
            Copied::Lost if open.server == HubServer::Primary => return Err(lost_engine()),
            Copied::Lost => return Ok(Run::NotThere),
        };
        put_question(&mut self.held[index].lease, asked.question, &mut replies)?;
        let mut trail = Trail::default();
        let first = self.next_chunk(index, &mut replies, &mut trail).await;
        if let HubServer::Replica(number) = open.server {
            let lost = matches!(first, Err(Failure::End(End::Fatal(_) | End::Told)));
            if lost {
                engine.replicas[number].doubt();
            }
            let ended = matches!(first, Ok((Flow::Ready(_) | Flow::Drained, _)));
            if lost || ended && of_a_standby(&trail) && !may_be_scans(scans, &trail) {
                return Ok(Run::NotThere);
            }
        }
        let (flow, reply) = first?;
        if trail.failed {
            if flow != Flow::Overflow && may_be_scans(scans, &trail) {
                return Ok(Run::Again);
            }
            match trail.sqlstate.as_ref() {
                Some(b"42803") => return Ok(Run::Ungrouped(Complaint::read(&reply))),
                // What the text of the client's would not have said.
                Some([b'4', b'2', ..]) if asked.edited => return Err(cannot(plan, NO_PRIMARY_KEYS).into()),
                _ => {}
            }
            if let Some(error) = bounds.hit(&trail) {
                return Err(error.into());
            }
        } else if untold {
            return Err(cannot(plan, "the types of its columns are not known").into());
        }
        let passed = bounds.take_rows(&reply).and_then(|()| {
            let own = with_own_types(&reply, asked, plan, &open.ready)?;
            if !trail.failed && asked.explains() {
                self.client
                    .put_notice(&format!("the fallback engine runs this on the hub's {}", engine.name_of(open.server)));
            }
            self.pass_engine(own, kept, plan)
        });
        if let (Err(_), Flow::Overflow) = (&passed, &flow) {
            self.held[index].lease.doubt("its rows were not wanted");
        }
        passed?;
        if flow == Flow::Overflow {
            self.pass_rest(index, (&mut replies, &mut trail), &mut bounds, kept).await?;
        }
        self.db.stats.server_error(&trail);
        if trail.failed {
            if let Some(txn) = &mut self.txn {
                txn.failed = true;
            }
            return Err(Failure::Reported);
        }
        Ok(Run::Done)
    }

    /// What the engine says next, as far as it is held back: all of it, unless the flow says that there is more.
    async fn next_chunk(
        &mut self,
        index: usize,
        replies: &mut Replies,
        trail: &mut Trail,
    ) -> Result<(Flow, BytesMut), Failure> {
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max: HELD_BYTES_MAX };
        let flow = self.relay_on(index, replies, &mut capture, trail).await?;
        Ok(match capture {
            Capture::Hold { reply, .. } => (flow, reply),
            Capture::Off => (flow, BytesMut::new()),
        })
    }

    /// The rows behind the first ones. A limit of the engine's is told in weir's words whenever it is hit.
    async fn pass_rest(
        &mut self,
        index: usize,
        (replies, trail): (&mut Replies, &mut Trail),
        bounds: &mut Bounds<'_>,
        kept: &mut Option<Kept>,
    ) -> Result<(), Failure> {
        loop {
            let (flow, mut reply) = self.next_chunk(index, replies, trail).await?;
            let hit = if trail.failed { bounds.hit(trail) } else { None };
            if hit.is_some() {
                without_error(&mut reply);
            }
            let passed = bounds.take_rows(&reply).and_then(|()| self.pass_engine(reply, kept, bounds.plan));
            if let Err(too_many) = passed {
                if flow == Flow::Overflow {
                    self.held[index].lease.doubt("its rows were not wanted");
                }
                return Err(too_many.into());
            }
            if let Some(error) = hit {
                return Err(error.into());
            }
            if flow != Flow::Overflow {
                return Ok(());
            }
            if self.client.out.len() > OUT_BYTES {
                self.client.send().await.map_err(|_| End::ClientGone)?;
            }
        }
    }

    /// Ends the engine's transaction and gives its Backend back. `unsure`: which statements are prepared there is not known.
    async fn close_engine(&mut self, unsure: bool) {
        let engine = ENGINE;
        let Some(index) = self.held.iter().position(|held| held.shard == engine) else { return };
        let Session { client, held, .. } = self;
        let lease = &mut held[index].lease;
        if !lease.is_doubted() && lease.status != weir_wire::backend::Status::Idle {
            lease.put_query("ROLLBACK");
            if !matches!(answer(lease, client).await, Ok(Ok(()))) {
                lease.doubt("lost after the fallback engine was asked");
            }
        }
        if unsure && !lease.is_doubted() {
            lease.put_query("DEALLOCATE ALL");
            match answer(lease, client).await {
                Ok(Ok(())) => lease.forget_all_prepared(),
                _ => lease.doubt("its prepared statements are not known"),
            }
        }
        self.held.remove(index);
    }
}

fn may_be_scans(scans: Scans, trail: &Trail) -> bool {
    scans == Scans::Together && trail.sqlstate.as_ref() == Some(b"08006")
}

/// Has a statement failed for a reason that may be the standby's own? Conflicts with its replay are 40001; it may be told to end, be short
/// of something, not reach a shard, or not know what a standby cannot do. A client's cancel and the engine's limits are none of these.
fn of_a_standby(trail: &Trail) -> bool {
    let Some(code) = &trail.sqlstate else { return false };
    let own_limit = matches!(code, b"57014" | b"53400");
    trail.failed
        && !own_limit
        && matches!(&code[..2], b"08" | b"0A" | b"25" | b"40" | b"53" | b"55" | b"57" | b"58" | b"XX")
}

/// OIDs below are the same on every server (FirstNormalObjectId in src/include/access/transam.h).
const FIRST_OWN_OID: u32 = 16_384;
/// ERRCODE_CANNOT_CONNECT_NOW.
const CANNOT_CONNECT_NOW: &str = "57P03";

pub fn wanted_for(plan: &Plan) -> String {
    match &plan.reason {
        RouteReason::Engine { refusal } => {
            let detail = refusal.detail.as_deref().unwrap_or(&refusal.message);
            format!("{}.", detail.trim_end_matches('.'))
        }
        reason => format!("{reason}."),
    }
}

/// The planner's refusal, and why the engine cannot help.
pub fn cannot(plan: &Plan, why: &str) -> UserError {
    let detail = format!("{} The fallback engine cannot answer it either: {why}.", wanted_for(plan));
    match &plan.reason {
        RouteReason::Engine { refusal } => UserError::clone(refusal).detail(detail),
        _ => UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this statement cannot run across shards")
            .detail(detail),
    }
}

/// A word of the statement that names what the engine does not have.
fn skipped_in(sql: &str, ready: &Ready) -> Option<String> {
    if ready.skipped.iter().all(|skipped| skipped.name.is_empty()) {
        return None;
    }
    let mut tokens = Vec::new();
    if lex(sql, &mut tokens).is_err() {
        return Some("its text is not understood".to_owned());
    }
    tokens.into_iter().filter_map(|token| word::name(sql, token)).find_map(|name| {
        let found = ready.skipped.iter().find(|skipped| skipped.name == name && !skipped.name.is_empty())?;
        Some(format!("{} {} is not there: {}", found.kind, found.shown, found.reason.trim_end_matches('.')))
    })
}
