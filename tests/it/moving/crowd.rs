//! Clients that do everything at once while slots move and servers die, and who know what must be there at the end.
//!
//! Invariant: whatever a client is told is true, and what it was not told (its connection or the server died) may be true or not: of
//! such a write both ends are right, of every other one only one is. Money moves between accounts and is never made. Where nothing dies
//! that a client talks to, no statement outside a transaction fails.
//! Non-goals: killing anything, and moving slots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt as _, TryStreamExt as _};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::Tier;

use crate::differential::Dice;
use crate::placement::column;

/// Accounts that are there all the time; those beyond come and go.
pub const ACCOUNTS: i64 = 400;
const BALANCE: i64 = 1000;
/// Clients of the proxy that lives, and one more for each that may die.
const STEADY: u64 = 8;
/// Accounts of one client's own that come and go begin at so many times its number.
const RANGE: i64 = 1_000_000;
const COPIED: i64 = 5;
/// For what is to be there again.
const WAIT: Duration = Duration::from_secs(60);

pub const TABLE: &str =
    "[[database.shop.table]]\nname = \"ledger\"\nkind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\"";

/// As [`TABLE`], with holders that are unique over all shards.
pub const UNIQUE: &str = "\nglobal_unique = [\"holder\"]";

/// What may happen now, and what has.
#[derive(Default)]
pub struct Weather {
    stop: AtomicBool,
    /// A server that clients' statements run on is about to die, or has.
    pub storm: AtomicBool,
    slowest_us: AtomicU64,
    statements: AtomicU64,
    transactions: AtomicU64,
    /// Told to begin again.
    again: AtomicU64,
    /// Nobody knows how they ended.
    unknown: AtomicU64,
}

impl Weather {
    /// The longest that a statement outside a transaction has taken since this was last asked.
    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.slowest_us.swap(0, SeqCst))
    }
}

/// How a request ended that did not end well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// Nothing of it is there.
    Refused,
    /// It may be there.
    Unknown,
}

fn fate(error: &tokio_postgres::Error) -> Option<Fate> {
    let Some(code) = error.code().map(tokio_postgres::error::SqlState::code) else {
        // The connection broke.
        return Some(Fate::Unknown);
    };
    match code {
        "40001" | "40P01" | "55P03" => Some(Fate::Refused),
        code if code.starts_with("08") || code.starts_with("57") => Some(Fate::Unknown),
        _ => None,
    }
}

/// Is an account that comes and goes there?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Presence {
    Here,
    Gone,
    Unknown,
}

/// What one client knows at the end.
#[derive(Default)]
struct Known {
    /// At least and at most, of what was added to an account.
    added: BTreeMap<i64, (i64, i64)>,
    guests: BTreeMap<i64, Presence>,
}

struct Customer {
    dsn: String,
    connection: Client,
    /// Its proxy may die.
    travels: bool,
    dice: Dice,
    weather: Arc<Weather>,
    own: Vec<i64>,
    known: Known,
    next: i64,
}

impl Customer {
    async fn new(number: u64, dsn: String, travels: bool, weather: Arc<Weather>, clients: u64) -> Result<Customer> {
        let own: Vec<i64> = (1..=ACCOUNTS).filter(|id| id % clients as i64 == number as i64).collect();
        let known = Known { added: own.iter().map(|id| (*id, (0, 0))).collect(), guests: BTreeMap::new() };
        let connection = weir_harness::connect(&dsn).await?;
        let (dice, next) = (Dice::new(number), RANGE * (number as i64 + 1));
        Ok(Customer { dsn, connection, travels, dice, weather, own, known, next })
    }

    async fn live(mut self) -> Result<Known> {
        while !self.weather.stop.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(self.dice.roll(10) as u64)).await;
            match self.dice.roll(10) {
                0..3 => self.add().await?,
                3..6 => self.transfer().await?,
                6 => self.count().await?,
                7 => self.sum().await?,
                8 => self.copy().await?,
                _ => self.come_and_go().await?,
            }
        }
        Ok(self.known)
    }

    /// A request outside a transaction block, timed. `None`: it has failed as it may.
    async fn single<T>(
        &mut self,
        what: &str,
        asked: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<Result<T, Fate>> {
        let (begun, storm) = (Instant::now(), self.weather.storm.load(SeqCst));
        let answer = asked(&self.connection).await;
        self.weather.slowest_us.fetch_max(begun.elapsed().as_micros() as u64, SeqCst);
        self.weather.statements.fetch_add(1, SeqCst);
        match answer {
            Ok(answer) => Ok(Ok(answer)),
            Err(error) => {
                let may_fail = self.travels || storm || self.weather.storm.load(SeqCst);
                let fate = fate(&error).filter(|_| may_fail);
                let took = begun.elapsed();
                let fate = fate.with_context(|| format!("{what}, after {took:?}, at {}: {error:?}", self.proxy()))?;
                self.recover(fate).await?;
                Ok(Err(fate))
            }
        }
    }

    /// Its port.
    fn proxy(&self) -> &str {
        self.dsn.rsplit(['@', '/']).nth(1).unwrap_or_default()
    }

    /// After an error: nothing is open, and the connection is there.
    async fn recover(&mut self, fate: Fate) -> Result<()> {
        let count = if fate == Fate::Unknown { &self.weather.unknown } else { &self.weather.again };
        count.fetch_add(1, SeqCst);
        if !self.connection.is_closed() && self.connection.batch_execute("ROLLBACK").await.is_ok() {
            return Ok(());
        }
        let begun = Instant::now();
        loop {
            match weir_harness::connect(&self.dsn).await {
                Ok(connection) => break self.connection = connection,
                Err(error) if begun.elapsed() > WAIT => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        Ok(())
    }

    /// One more on an account of its own, in a statement or with a look in the same text; and a look what is there.
    async fn add(&mut self) -> Result<()> {
        let account = self.own[self.dice.roll(self.own.len())];
        let wrote = if self.dice.percent(70) {
            let sql = "UPDATE ledger SET added = added + 1 WHERE user_id = $1";
            self.single("a single write", async |client| client.execute(sql, &[&account]).await.map(drop)).await?
        } else {
            let sql = format!(
                "UPDATE ledger SET added = added + 1 WHERE user_id = {account}; SELECT added FROM ledger WHERE user_id = {account}"
            );
            self.single("two in one text", async |client| client.simple_query(&sql).await.map(drop)).await?
        };
        let known = self.known.added.get_mut(&account).context("its own")?;
        match wrote {
            Ok(()) => *known = (known.0 + 1, known.1 + 1),
            Err(Fate::Unknown) => known.1 += 1,
            Err(Fate::Refused) => {}
        }
        let sql = "SELECT added FROM ledger WHERE user_id = $1";
        let seen = self.single("a single read", async |client| client.query_one(sql, &[&account]).await).await?;
        let known = self.known.added.get_mut(&account).context("its own")?;
        if let Ok(row) = seen {
            let seen: i64 = row.get(0);
            ensure!((known.0..=known.1).contains(&seen), "account {account} has {seen}, and it is {known:?}");
            known.0 = seen;
        }
        Ok(())
    }

    async fn transfer(&mut self) -> Result<()> {
        let mut any = || self.dice.roll(ACCOUNTS as usize) as i64 + 1;
        let (from, to) = (any(), any());
        let isolation = self.dice.pick(&["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]);
        let done = transfer(&self.connection, (from, to), isolation).await;
        self.weather.transactions.fetch_add(1, SeqCst);
        let Err(error) = done else { return Ok(()) };
        // A transaction that writes with one snapshot stays on one shard.
        let is_wide = error.code().is_some_and(|code| code.code() == "0A000") && isolation != "READ COMMITTED";
        let fate = fate(&error).or(is_wide.then_some(Fate::Refused));
        let may_be_lost = self.travels || self.weather.storm.load(SeqCst);
        let fate = fate.filter(|fate| *fate == Fate::Refused || may_be_lost);
        let fate = fate.with_context(|| format!("a transfer, {isolation}: {error:?}"))?;
        self.recover(fate).await
    }

    /// Accounts of all shards, in one statement.
    async fn count(&mut self) -> Result<()> {
        let count = if self.dice.percent(50) {
            let sql = "SELECT count(*) FROM ledger WHERE user_id <= $1";
            let found = self.single("a count", async |client| client.query_one(sql, &[&ACCOUNTS]).await).await?;
            found.map(|row| row.get::<_, i64>(0))
        } else {
            let sql = format!("COPY (SELECT user_id FROM ledger WHERE user_id <= {ACCOUNTS}) TO STDOUT");
            let copied = self.single("COPY out", async |client| {
                let pieces: Vec<Bytes> = client.copy_out(&sql).await?.try_collect().await?;
                Ok(String::from_utf8_lossy(&pieces.concat()).lines().count() as i64)
            });
            copied.await?
        };
        ensure!(count.is_err() || count == Ok(ACCOUNTS), "{count:?} accounts are seen");
        Ok(())
    }

    /// The money of all shards, in one snapshot.
    async fn sum(&mut self) -> Result<()> {
        let sql = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; \
             SELECT count(*), sum(balance) FROM ledger WHERE user_id <= {ACCOUNTS}; COMMIT"
        );
        let storm = self.weather.storm.load(SeqCst);
        self.weather.transactions.fetch_add(1, SeqCst);
        match self.connection.simple_query(&sql).await {
            Ok(messages) => {
                let row = messages.iter().find_map(|message| match message {
                    SimpleQueryMessage::Row(row) => Some((row.get(0)?.to_owned(), row.get(1)?.to_owned())),
                    _ => None,
                });
                let all = (ACCOUNTS.to_string(), (ACCOUNTS * BALANCE).to_string());
                ensure!(row.as_ref() == Some(&all), "one snapshot has {row:?}");
                Ok(())
            }
            Err(error) => {
                let may_be_lost = self.travels || storm || self.weather.storm.load(SeqCst);
                let fate = fate(&error).filter(|fate| *fate == Fate::Refused || may_be_lost);
                let fate = fate.with_context(|| format!("a sum: {error:?}"))?;
                self.recover(fate).await
            }
        }
    }

    /// Some accounts that are new, of any shard.
    async fn copy(&mut self) -> Result<()> {
        let new: Vec<i64> = (self.next..self.next + COPIED).collect();
        self.next += COPIED;
        let lines: String = new.iter().flat_map(|id| [id.to_string(), "\t0\n".to_owned()]).collect();
        let copied = self.single("COPY in", async |client| {
            let sink = client.copy_in("COPY ledger (user_id, balance) FROM STDIN").await?;
            let mut sink = std::pin::pin!(sink);
            sink.send(Bytes::from(lines)).await?;
            sink.finish().await
        });
        let presence = match copied.await? {
            Ok(_) => Presence::Here,
            Err(Fate::Refused) => Presence::Gone,
            Err(Fate::Unknown) => Presence::Unknown,
        };
        self.known.guests.extend(new.into_iter().map(|id| (id, presence)));
        Ok(())
    }

    /// One account goes, or a new one comes.
    async fn come_and_go(&mut self) -> Result<()> {
        let here: Vec<i64> =
            self.known.guests.iter().filter(|(_, is)| **is == Presence::Here).map(|(id, _)| *id).collect();
        if here.len() > 20 || self.dice.percent(30) && !here.is_empty() {
            let id = here[self.dice.roll(here.len())];
            let sql = "DELETE FROM ledger WHERE user_id = $1";
            let gone = self.single("a delete", async |client| client.execute(sql, &[&id]).await).await?;
            ensure!(gone.is_err() || gone == Ok(1), "{gone:?} rows of account {id} were there");
            match gone {
                Ok(_) => drop(self.known.guests.insert(id, Presence::Gone)),
                Err(Fate::Unknown) => drop(self.known.guests.insert(id, Presence::Unknown)),
                Err(Fate::Refused) => {}
            }
            return Ok(());
        }
        let id = self.next;
        self.next += 1;
        let sql = "INSERT INTO ledger (user_id, balance) VALUES ($1, 0)";
        let came = self.single("an insert", async |client| client.execute(sql, &[&id]).await).await?;
        let presence = match came {
            Ok(_) => Presence::Here,
            Err(Fate::Refused) => Presence::Gone,
            Err(Fate::Unknown) => Presence::Unknown,
        };
        self.known.guests.insert(id, presence);
        Ok(())
    }
}

async fn transfer(client: &Client, (from, to): (i64, i64), isolation: &str) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).await?;
    // In the order of the numbers, so that two transfers do not wait for each other.
    for account in [from.min(to), from.max(to)] {
        let amount = i64::from(account == to) - i64::from(account == from);
        client.execute("UPDATE ledger SET balance = balance + $2 WHERE user_id = $1", &[&account, &amount]).await?;
    }
    client.batch_execute("COMMIT").await
}

/// The ledger, filled.
pub async fn ledger(tier: &Tier) -> Result<()> {
    let client = tier.connect().await?;
    client
        .batch_execute(
            "CREATE TABLE ledger (user_id bigint PRIMARY KEY, balance bigint NOT NULL, added bigint NOT NULL DEFAULT 0, \
             holder text GENERATED ALWAYS AS ('h' || user_id) STORED)",
        )
        .await?;
    let sql = "INSERT INTO ledger (user_id, balance) SELECT n, $2::int8 FROM generate_series(1, $1::int8) n";
    client.execute(sql, &[&ACCOUNTS, &BALANCE]).await?;
    Ok(())
}

/// All clients, which work until they are told to stop.
pub struct Crowd {
    pub weather: Arc<Weather>,
    customers: Vec<tokio::task::JoinHandle<Result<Known>>>,
}

impl Crowd {
    /// `steady`: the proxy that lives; `others`: those that may die.
    pub async fn gather(steady: &str, others: &[String]) -> Result<Crowd> {
        let weather = Arc::<Weather>::default();
        let clients = STEADY + others.len() as u64;
        let mut customers = Vec::new();
        for number in 0..clients {
            let other = number.checked_sub(STEADY).and_then(|other| others.get(other as usize));
            let (dsn, travels) = (other.map_or(steady, String::as_str).to_owned(), other.is_some());
            let customer = Customer::new(number, dsn, travels, Arc::clone(&weather), clients).await?;
            customers.push(tokio::spawn(customer.live()));
        }
        Ok(Crowd { weather, customers })
    }

    /// Errors: somebody has seen what must not be.
    pub fn is_well(&self) -> bool {
        self.customers.iter().all(|customer| !customer.is_finished())
    }

    /// Stops them, and compares what they know with what is there.
    pub async fn disperse(self, tier: &Tier) -> Result<()> {
        self.weather.stop.store(true, SeqCst);
        let mut known = Known::default();
        for customer in self.customers {
            let one = customer.await??;
            known.added.extend(one.added);
            known.guests.extend(one.guests);
        }
        let weather = &self.weather;
        let [statements, transactions, again, unknown] =
            [&weather.statements, &weather.transactions, &weather.again, &weather.unknown].map(|n| n.load(SeqCst));
        println!(
            "{statements} single statements, {transactions} transactions, {again} begun again, {unknown} of unknown end"
        );
        decided(tier).await?;
        known.hold(&found(tier).await?)
    }
}

/// Two-phase commits end a moment after they are told, and those whose coordinator is dead when they are found.
pub async fn decided(tier: &Tier) -> Result<()> {
    crate::freshness::until(async || {
        let mut prepared = Vec::new();
        for shard in &tier.shards {
            prepared.extend(column(&shard.primary.admin("shop").await?, "SELECT gid FROM pg_prepared_xacts").await?);
        }
        Ok(prepared.is_empty())
    })
    .await
}

/// Of every account the balance and what was added, from the shards themselves. Errors: one is on two.
async fn found(tier: &Tier) -> Result<BTreeMap<i64, (i64, i64)>> {
    let mut all = BTreeMap::new();
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        for row in direct.query("SELECT user_id, balance, added FROM ledger", &[]).await? {
            let id: i64 = row.get(0);
            ensure!(all.insert(id, (row.get(1), row.get(2))).is_none(), "account {id} is on two shards");
        }
    }
    Ok(all)
}

impl Known {
    fn hold(&self, found: &BTreeMap<i64, (i64, i64)>) -> Result<()> {
        let mut money = 0;
        for id in 1..=ACCOUNTS {
            let (balance, added) = found.get(&id).with_context(|| format!("account {id} is lost"))?;
            money += balance;
            let Some((least, most)) = self.added.get(&id) else { bail!("account {id} is nobody's") };
            ensure!((least..=most).contains(&added), "account {id} has {added}, and it is {least} to {most}");
        }
        ensure!(money == ACCOUNTS * BALANCE, "{money} is there instead of {}", ACCOUNTS * BALANCE);
        for (id, presence) in &self.guests {
            let is_here = found.contains_key(id);
            let is_right = match presence {
                Presence::Here => is_here,
                Presence::Gone => !is_here,
                Presence::Unknown => true,
            };
            ensure!(is_right, "account {id} is {presence:?}, and found: {is_here}");
        }
        let stranger = found.keys().find(|id| **id > ACCOUNTS && !self.guests.contains_key(id));
        ensure!(stranger.is_none(), "account {stranger:?} is nobody's");
        Ok(())
    }
}
