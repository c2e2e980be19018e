//! Statements about the session and its transaction, which weir answers itself or must know of.
//!
//! Invariant: a setting counts for the session only after a server has accepted it; a savepoint exists on every Backend
//! of the transaction, those that join later included.

use bytes::BytesMut;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::plan::{Access, RouteReason, Values};
use weir_core::pool::Mode;
use weir_core::session::pin::Pin;
use weir_core::session::replies::{Owed, Replies};
use weir_core::session::vars::{VarSet, Vars, replay};
use weir_core::sql::class::{Class, Discard, Isolation, Modes, Scope, SetValue, Target};
use weir_core::topology::Width;
use weir_wire::backend::{Report, Status, tag};
use weir_wire::frame;
use weir_wire::frontend::put_query;

use super::session::{Failure, Joined, Session, Transaction};
use super::transaction::modes_over;
use crate::exec::relay::{Capture, Flow, Trail};
use crate::exec::snapshot::not_exported;
use crate::statements::relex;

impl Session {
    /// Runs a control statement and writes its reply but ReadyForQuery. False: it is not one.
    pub async fn control(&mut self, sql: &str, class: &Class) -> Result<bool, Failure> {
        if self.txn.as_ref().is_some_and(|txn| txn.failed) && !class.ends_failed_transaction() {
            // A server that knows of the failure says so itself, or that the text is no SQL at all.
            return if self.server_knows_failure() && !class.is_control() { Ok(false) } else { Err(aborted().into()) };
        }
        if !self.is_for_weir(class) {
            return Ok(false);
        }
        match class {
            Class::Begin(_) if self.stats.mode() == Mode::Statement => {
                return Err(super::mode::no_transactions().into());
            }
            Class::Begin(modes) => {
                let tag = if sql.trim_start().get(..5).is_some_and(|word| word.eq_ignore_ascii_case("start")) {
                    "START TRANSACTION"
                } else {
                    "BEGIN"
                };
                self.begin(sql, modes_over(*modes, self.default_modes()), tag);
            }
            Class::Commit { chain } => self.end(true, *chain).await?,
            Class::Rollback { chain } => self.end(false, *chain).await?,
            Class::Savepoint(name) => self.savepoint(sql, name).await?,
            Class::Release(name) => self.release_savepoint(sql, name).await?,
            Class::RollbackTo(name) => self.roll_back_to(sql, name).await?,
            Class::PrepareTransaction if self.txn.as_ref().is_some_and(|txn| txn.failed) => {
                self.end(false, false).await?;
            }
            Class::PrepareTransaction if self.is_single() => self.prepare_transaction(sql).await?,
            Class::SetTransaction(modes) => self.set_transaction(sql, *modes).await?,
            Class::SetConstraints => self.set_local(sql, "SET CONSTRAINTS", "SET CONSTRAINTS").await?,
            Class::Set { name, scope, .. } => {
                let of_transaction = self.txn.is_some() && name.starts_with("transaction_");
                match scope {
                    Scope::Session if !of_transaction => self.set(sql, class).await?,
                    _ => self.set_local(sql, "SET LOCAL", "SET").await?,
                }
                self.note_modes(class);
            }
            Class::Reset(_) | Class::SetCharacteristics(_) => self.set(sql, class).await?,
            Class::Discard(Discard::All) => self.discard_all(sql).await?,
            Class::Deallocate(Target::Name(name)) => self.deallocate(sql, Some(name)).await?,
            Class::Deallocate(Target::All) => self.deallocate(sql, None).await?,
            Class::Prepare { inner, .. } if self.is_of_home(sql, *inner) => {
                let home = self.view().topology.home;
                self.see(b"", class).await?;
                self.run_prepare(home, sql).await?;
            }
            Class::Prepare { .. } => self.pin_home(sql, Pin::SqlPrepare, "PREPARE").await?,
            Class::Execute { .. } if self.prepared_on_one && self.is_spread() => return Err(prepared_before().into()),
            Class::Execute { .. } => self.on_pinned_or_home(sql).await?,
            Class::Listen(_) => self.pin_home(sql, Pin::Listen, "LISTEN").await?,
            Class::Unlisten(_) if self.pinned_index().is_none() => self.put_tag("UNLISTEN"),
            Class::Unlisten(_) => self.on_pinned_or_home(sql).await?,
            Class::PrepareTransaction | Class::CommitPrepared | Class::RollbackPrepared if !self.is_single() => {
                return Err(refused(
                    "two-phase commit by the client",
                    "weir itself commits in two phases where a transaction spans shards",
                    "Use COMMIT.",
                ));
            }
            Class::Fetch { .. } | Class::Move { .. } | Class::CloseCursor(_) => {
                if !self.use_cursor(sql, class, true).await? {
                    self.on_cursor(sql, class).await?;
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Does the session carry a statement of this class out itself, instead of sending it where its plan says?
    pub fn is_for_weir(&self, class: &Class) -> bool {
        class.is_control() && !(class.keeps_to_one_server() && self.is_single())
    }

    /// May what one statement touches lie on several shards?
    fn is_spread(&self) -> bool {
        let view = self.view();
        view.width == Width::Several && view.rules.any_sharded()
    }

    pub fn is_single(&self) -> bool {
        self.view().topology.is_single()
    }

    /// Has the only server of this database aborted the transaction itself?
    pub fn server_knows_failure(&self) -> bool {
        self.is_single() && self.held.iter().any(|held| held.begun && held.lease.status == Status::Failed)
    }

    /// What the session's own settings say of transactions that say nothing.
    pub fn default_modes(&self) -> Modes {
        let vars = self.vars.current();
        Modes {
            isolation: vars.get("default_transaction_isolation").and_then(isolation_of),
            read_only: vars.get("default_transaction_read_only").and_then(flag_of),
            deferrable: vars.get("default_transaction_deferrable").and_then(flag_of),
        }
    }

    fn begin(&mut self, sql: &str, modes: Modes, tag: &str) {
        if self.txn.is_some() {
            self.warn("25001", "there is already a transaction in progress");
        } else {
            self.txn = Some(Transaction::lazy(sql, modes));
            self.vars.on_begin();
        }
        self.put_tag(tag);
    }

    async fn end(&mut self, commit: bool, chain: bool) -> Result<(), Failure> {
        let Some(txn) = &self.txn else {
            if chain {
                self.require_transaction(if commit { "COMMIT AND CHAIN" } else { "ROLLBACK AND CHAIN" })?;
            }
            self.warn("25P01", "there is no transaction in progress");
            self.put_tag(if commit { "COMMIT" } else { "ROLLBACK" });
            return Ok(());
        };
        let commit = commit && !txn.failed;
        let again = chain.then(|| txn.chained());
        if commit {
            self.commit_all().await?;
        } else {
            self.roll_back_all().await?;
        }
        self.put_tag(if commit { "COMMIT" } else { "ROLLBACK" });
        self.txn = again;
        Ok(())
    }

    /// Ends the transaction for this session, settings as after COMMIT, or rolls it back with the server's error.
    async fn prepare_transaction(&mut self, sql: &str) -> Result<(), Failure> {
        let home = self.view().topology.home;
        let mut request = BytesMut::new();
        put_query(&mut request, sql);
        let trail = self.run_raw(home, &request, &[weir_core::fresh::Dependency::Anything]).await?;
        if self.txn.is_none() {
            self.close_transaction(!trail.failed);
        }
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }

    async fn savepoint(&mut self, sql: &str, name: &str) -> Result<(), Failure> {
        self.require_transaction("SAVEPOINT")?;
        self.tell_begun(sql).await?;
        self.join(sql, Some(name.into()));
        self.vars.on_savepoint(name);
        self.put_tag("SAVEPOINT");
        Ok(())
    }

    async fn release_savepoint(&mut self, sql: &str, name: &str) -> Result<(), Failure> {
        let place = self.find_savepoint(name, "RELEASE SAVEPOINT")?;
        self.tell_begun(sql).await?;
        if let (Some(txn), Some(place)) = (&mut self.txn, place) {
            let later = txn.prelude.split_off(place);
            txn.prelude.extend(later.into_iter().filter(|joined| joined.savepoint.is_none()));
        }
        self.put_tag("RELEASE");
        Ok(())
    }

    async fn roll_back_to(&mut self, sql: &str, name: &str) -> Result<(), Failure> {
        let place = self.find_savepoint(name, "ROLLBACK TO SAVEPOINT")?;
        self.tell_begun(sql).await?;
        if let Some(txn) = &mut self.txn {
            txn.prelude.truncate(place.map_or(usize::MAX, |place| place + 1));
            txn.failed = false;
            let length = txn.prelude.len();
            self.open_reads.retain(|read| !read.is_younger(length));
        }
        self.vars.on_rollback_to(name);
        self.put_tag("ROLLBACK");
        Ok(())
    }

    /// Where in the prelude the savepoint is made. `None`: the only server may know it from a text of several statements.
    fn find_savepoint(&mut self, name: &str, what: &str) -> Result<Option<usize>, Failure> {
        self.require_transaction(what)?;
        let found = self
            .txn
            .as_ref()
            .and_then(|txn| txn.prelude.iter().rposition(|joined| joined.savepoint.as_deref() == Some(name)));
        if found.is_none() && !(self.is_single() && self.held.iter().any(|held| held.begun)) {
            let missing = format!("savepoint \"{name}\" does not exist");
            return Err(UserError::new(Blame::Client, "3B001", missing).into());
        }
        Ok(found)
    }

    fn require_transaction(&self, what: &str) -> Result<(), Failure> {
        match &self.txn {
            Some(_) => Ok(()),
            None => {
                Err(UserError::new(Blame::Client, "25P01", format!("{what} can only be used in transaction blocks"))
                    .into())
            }
        }
    }

    fn join(&mut self, sql: &str, savepoint: Option<Box<str>>) {
        if let Some(txn) = &mut self.txn {
            txn.prelude.push(Joined { sql: sql.to_owned(), savepoint });
        }
    }

    /// Sends a statement to every Backend that is in the transaction already.
    async fn tell_begun(&mut self, sql: &str) -> Result<(), Failure> {
        let begun: Vec<usize> = (0..self.held.len()).filter(|index| self.held[*index].begun).collect();
        self.tell_all(&begun, sql).await
    }

    async fn set_transaction(&mut self, sql: &str, modes: Modes) -> Result<(), Failure> {
        if modes == Modes::default() && !self.is_single() {
            return Err(not_exported().into());
        }
        if self.txn.is_none() {
            self.warn("25P01", "SET TRANSACTION can only be used in transaction blocks");
        }
        self.tell_begun(sql).await?;
        if let Some(txn) = &mut self.txn {
            txn.set_modes(modes);
        }
        self.join(sql, None);
        self.put_tag("SET");
        Ok(())
    }

    async fn set_local(&mut self, sql: &str, what: &str, tag: &str) -> Result<(), Failure> {
        if self.txn.is_some() {
            if self.held.iter().all(|held| !held.begun) {
                // Somebody must say whether the value is valid.
                let home = self.view().topology.home;
                self.hold(home).await?;
                self.begin_on_held().await?;
            }
            self.tell_begun(sql).await?;
            self.join(sql, None);
        } else {
            self.warn("25P01", &format!("{what} can only be used in transaction blocks"));
        }
        self.put_tag(tag);
        Ok(())
    }

    /// A transaction's modes may be set like any other setting.
    fn note_modes(&mut self, class: &Class) {
        let (Class::Set { name, value: SetValue::Text(value), .. }, Some(txn)) = (class, &mut self.txn) else { return };
        txn.set_modes(match &**name {
            "transaction_isolation" => Modes { isolation: isolation_of(value), ..Modes::default() },
            "transaction_read_only" => Modes { read_only: flag_of(value), ..Modes::default() },
            "transaction_deferrable" => Modes { deferrable: flag_of(value), ..Modes::default() },
            _ => return,
        });
    }

    async fn set(&mut self, sql: &str, class: &Class) -> Result<(), Failure> {
        Self::check_level(class)?;
        let mut begun: Vec<usize> = (0..self.held.len())
            .filter(|index| self.held[*index].begun || self.held[*index].pinned.is_some())
            .collect();
        if begun.is_empty() {
            let home = self.view().topology.home;
            begun.push(self.hold(home).await?);
        }
        // The first one's reply is the client's: its ParameterStatus is how drivers learn of the change.
        let first = begun.remove(0);
        let restored = self.reset(first, sql, class).await?;
        if !restored {
            let shard = self.held[first].shard;
            let mut request = BytesMut::new();
            put_query(&mut request, sql);
            let trail = self.run_raw(shard, &request, &[]).await?;
            if trail.failed {
                return Err(Failure::Reported);
            }
        }
        self.tell_all(&begun, sql).await?;
        for index in std::iter::once(first).chain(begun) {
            self.note_setting(index, class);
        }
        if restored && let Some(held) = self.held.get_mut(first) {
            held.lease.vars = self.vars.current().clone();
        }
        Ok(())
    }

    /// RESET of what the client brought at login: for the server the default is its own, for the client it is what it brought,
    /// and that is what it must be told. False: nothing of the kind, and nothing was done.
    async fn reset(&mut self, index: usize, sql: &str, class: &Class) -> Result<bool, Failure> {
        let Class::Reset(target) = class else { return Ok(false) };
        let mut servers = self.vars.current().clone();
        match target {
            Target::Name(name) => servers.remove(name),
            Target::All => servers = VarSet::default(),
        }
        let mut after = self.vars.clone();
        after.on_done(class, self.txn.is_some());
        let Some(restore) = replay(&servers, after.current()) else { return Ok(false) };
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        // In one request, so that a value that comes back is not reported as gone in between.
        self.held[index].lease.put_query(&format!("{sql}\n;{restore}"));
        replies.push(Owed::Query { hidden: false });
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max: usize::MAX };
        let mut trail = Trail::default();
        if let Flow::Ready(status) = self.relay_on(index, &mut replies, &mut capture, &mut trail).await? {
            self.follow(index, status);
        }
        self.db.stats.server_error(&trail);
        let Capture::Hold { reply, .. } = capture else { return Ok(false) };
        let mut rest = &reply[..];
        let mut complete = None;
        while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
            if next.tag == tag::COMMAND_COMPLETE {
                complete.get_or_insert(next.raw);
            } else {
                self.client.out.extend_from_slice(next.raw);
            }
            rest = &rest[next.raw.len()..];
        }
        if trail.failed {
            return Err(Failure::Reported);
        }
        // SET … TO DEFAULT has another tag than RESET.
        self.client.out.extend_from_slice(complete.unwrap_or_default());
        Ok(true)
    }

    /// A server has accepted a SET or RESET on this Backend.
    pub fn note_setting(&mut self, index: usize, class: &Class) {
        match class {
            Class::Set { .. } | Class::Reset(_) | Class::SetCharacteristics(_) | Class::Discard(Discard::All) => {
                self.vars.on_done(class, self.txn.is_some());
            }
            _ => return,
        }
        let Some(held) = self.held.get_mut(index) else { return };
        match class {
            // The server went back to its own defaults, not to what the client brought at login: that is applied again
            // before the next statement.
            Class::Reset(Target::Name(name)) => held.lease.vars.remove(name),
            Class::Reset(Target::All) => held.lease.vars = VarSet::default(),
            _ => held.lease.vars = self.vars.current().clone(),
        }
    }

    /// A server has run all of a text: what its statements mean for the session's settings, and for the Backend's.
    /// `open`: a transaction block was open before it.
    pub fn note_settings(&mut self, index: usize, classes: &[&Class], mut open: bool) {
        if !classes.iter().any(|class| class.sets_session() || class.controls_transaction()) {
            return;
        }
        let held = &mut self.held[index];
        let mut server = Vars::of_server(held.lease.vars.clone(), open.then(|| held.vars_before.clone()));
        for class in classes {
            // Without BEGIN the text is a transaction of its own.
            self.vars.on_done(class, true);
            server.on_done(class, true);
            match class {
                Class::Begin(_) => open = true,
                Class::Commit { chain } | Class::Rollback { chain } => open = *chain,
                _ => {}
            }
        }
        if open {
            held.vars_before = server.before().clone();
        } else {
            self.vars.on_commit();
            server.on_commit();
        }
        held.lease.vars = server.current().clone();
    }

    /// An error ended a text or pipeline half-way: how far it came is not known, so neither is what it has set.
    pub fn note_failed(&mut self, index: usize, classes: &[&Class], open: bool) {
        let held = &mut self.held[index];
        let ended = open && held.lease.status == Status::Idle;
        let unsure = |class: &&Class| class.sets_session() || matches!(class, Class::Deallocate(_));
        if classes.iter().any(unsure) || (ended && self.vars.before() != self.vars.current()) {
            held.lease.doubt("settings of a failed text");
        }
        if ended {
            self.vars.on_rollback();
        } else if !open && held.lease.status != Status::Idle {
            self.vars.on_begin();
            held.vars_before = held.lease.vars.clone();
        }
    }

    async fn discard_all(&mut self, sql: &str) -> Result<(), Failure> {
        if self.txn.is_some() {
            return Err(
                UserError::new(Blame::Client, "25001", "DISCARD ALL cannot run inside a transaction block").into()
            );
        }
        let index = match self.pinned_index() {
            Some(index) => index,
            None => {
                let home = self.view().topology.home;
                self.hold(home).await?
            }
        };
        self.prepared_on_one = false;
        let shard = self.held[index].shard;
        let mut request = BytesMut::new();
        put_query(&mut request, sql);
        let trail = self.run_raw(shard, &request, &[]).await?;
        if trail.failed {
            return Err(Failure::Reported);
        }
        self.names.forget_statements();
        self.drawn = None;
        self.vars.on_discard_all();
        for (other, held) in self.held.iter_mut().enumerate() {
            if other == index {
                held.lease.forget_all_prepared();
                held.lease.vars = VarSet::default();
            } else {
                held.lease.doubt("pinned before DISCARD ALL");
            }
            if let Some(pin) = held.pinned.take() {
                self.db.stats.unpinned(pin);
            }
        }
        Ok(())
    }

    async fn deallocate(&mut self, sql: &str, name: Option<&str>) -> Result<(), Failure> {
        match name {
            Some(name) if self.names.close_statement(name.as_bytes()).0 => {}
            Some(_) => return self.on_pinned_or_home(sql).await,
            None => {
                self.prepared_on_one = false;
                self.names.forget_statements();
                if let Some(index) = self.pinned_index() {
                    self.tell_all(&[index], sql).await?;
                    self.held[index].lease.forget_all_prepared();
                }
            }
        }
        self.put_tag(if name.is_some() { "DEALLOCATE" } else { "DEALLOCATE ALL" });
        Ok(())
    }

    /// State that only one server connection can keep: the session stays on it.
    async fn pin_home(&mut self, sql: &str, pin: Pin, what: &'static str) -> Result<(), Failure> {
        if self.is_spread() {
            let why = "it would live on one shard only, while the data is spread over several";
            let hint = if pin == Pin::Listen {
                "Listen on a shard directly."
            } else {
                "Use protocol-level prepared statements, which every driver offers."
            };
            return Err(refused(what, why, hint));
        }
        self.on_pinned_or_home(sql).await?;
        if let Some(index) = self.held.iter().position(|held| !held.lease.busy) {
            self.pin(index, pin);
        }
        Ok(())
    }

    /// Does a PREPARE, whose statement begins with this token, read nothing but the catalogue? Then the home shard answers for all.
    fn is_of_home(&mut self, sql: &str, inner: usize) -> bool {
        if self.is_single() {
            return false;
        }
        relex(sql, &mut self.scratch);
        let Some(text) = self.scratch.tokens.get(inner).and_then(|token| sql.get(token.start as usize..)) else {
            return false;
        };
        let view = self.view();
        let known = self.db.statements.understand(text, &view, &mut self.scratch);
        let values = Values { params: &[], sql: text, literals: &self.scratch.normal.literals };
        known.template.bind(&values, &view.topology).is_ok_and(|plan| {
            !matches!(plan.access, Access::Write)
                && matches!(plan.reason, RouteReason::SystemCatalog | RouteReason::NoTable)
        })
    }

    async fn run_prepare(&mut self, shard: ShardId, sql: &str) -> Result<(), Failure> {
        let mut request = BytesMut::new();
        put_query(&mut request, sql);
        let trail = self.run_raw(shard, &request, &[]).await?;
        if trail.failed {
            return Err(Failure::Reported);
        }
        if let Some(index) = self.held.iter().position(|held| held.shard == shard) {
            self.pin(index, Pin::SqlPrepare);
        }
        Ok(())
    }

    async fn on_pinned_or_home(&mut self, sql: &str) -> Result<(), Failure> {
        self.see(sql.as_bytes(), &Class::Other).await?;
        let shard = self.pinned_or_home();
        let mut request = BytesMut::new();
        put_query(&mut request, sql);
        let writes = [weir_core::fresh::Dependency::Anything];
        let trail = self.run_raw(shard, &request, &writes).await?;
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }

    /// Where what only a server knows of this session is.
    pub fn pinned_or_home(&self) -> ShardId {
        let held = self.pinned_index().map(|index| &self.held[index]).or(self.held.first());
        held.map_or(self.view().topology.home, |held| held.shard)
    }

    pub fn warn(&mut self, sqlstate: &str, message: &str) {
        Report { severity: "WARNING", sqlstate, message, detail: None, hint: None, routine: None }
            .put(tag::NOTICE, &mut self.client.out);
    }
}

fn prepared_before() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "statements that were prepared in SQL are not known any more")
        .detail("The database had one shard when PREPARE was run. Its data is spread over several now, and that server has a part of it.")
        .hint("Run DEALLOCATE ALL, and use protocol-level prepared statements, which every driver offers.")
}

/// A value as it stands behind SET.
fn isolation_of(value: &str) -> Option<Isolation> {
    let value = value.trim_matches('\'').to_ascii_lowercase();
    let levels = [Isolation::ReadUncommitted, Isolation::ReadCommitted, Isolation::RepeatableRead];
    levels.into_iter().chain([Isolation::Serializable]).find(|level| level.as_str() == value)
}

/// A value as it stands behind SET; Postgres takes any beginning of a word (parse_bool in src/backend/utils/adt/bool.c).
fn flag_of(value: &str) -> Option<bool> {
    let value = value.trim_matches('\'').to_ascii_lowercase();
    let begins = |word: &str| word.starts_with(&value);
    match &*value {
        "" | "o" => None,
        "on" | "1" => Some(true),
        "0" => Some(false),
        _ if begins("true") || begins("yes") => Some(true),
        _ if begins("false") || begins("no") || begins("off") => Some(false),
        _ => None,
    }
}

pub fn aborted() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::IN_FAILED_TRANSACTION,
        "current transaction is aborted, commands ignored until end of transaction block",
    )
}

pub fn refused(what: &str, why: &'static str, hint: &'static str) -> Failure {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!("{what} is not supported over several shards"),
    )
    .detail(why)
    .hint(hint)
    .into()
}
