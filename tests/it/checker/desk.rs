//! What the checker knows: the registers, what was told of each, who asks, and what was found.
//!
//! A register is a row that one writer alone counts up, so that "older" is "less". Most are written through weir. A few are written
//! beside it: of those nobody is promised that a read shows them at once, and so only their end is checked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use tokio::sync::RwLock;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Statement};
use weir_harness::{Proxy, Server, Tier};

use super::Settings;
use super::traffic::{BATCH, READ, query_all};
use crate::differential::Dice;
use crate::freshness::cache_figure;
use crate::placement::create_schema;

/// One statement may wait for a dead proxy's lease, a server's start, and a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Registers that are written beside weir; they come behind the others.
const BESIDE: usize = 24;
/// From here on: rows of disturbances, see `own_rows`.
pub const OWN: i64 = 20_000;
pub const OWN_COUNT: i64 = 16;
/// Shares of writes that take turns, in percent.
const WRITES: [u64; 6] = [5, 5, 10, 5, 30, 50];
/// Readers and writers may run ahead of each other by so many statements.
const SLACK: u64 = 300;
/// Longest time until writes beside weir are seen everywhere: a decoder may have to begin anew first.
const BESIDE_MAX: Duration = Duration::from_secs(40);
const FIGURES_MAX: Duration = Duration::from_secs(3);

pub struct Desk {
    pub settings: Settings,
    pub tier: Tier,
    more: Vec<Proxy>,
    /// By shard: which of its servers is the primary now.
    heads: Mutex<Vec<usize>>,
    registers: Vec<Register>,
    zipf: Zipf,
    /// Held by everybody who asks, and as a whole by whoever needs all to be still.
    pub still: RwLock<()>,
    pub figures: Figures,
    answered: Mutex<Answered>,
    pace: Mutex<Pace>,
    found: Mutex<Option<Violation>>,
    begun: Instant,
    closed: AtomicBool,
}

#[derive(Default)]
struct Register {
    /// The highest value whose write was acknowledged, and the highest that was read.
    acknowledged: AtomicI64,
    read: AtomicI64,
}

/// What a read that begins now must not fall below.
#[derive(Clone, Copy, Debug)]
pub struct Least {
    acknowledged: i64,
    read: i64,
}

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// "stale": less than was acknowledged; "backwards": less than was read; "left behind": wrong when all was still.
    pub what: &'static str,
    pub text: String,
    pub reads: u64,
    pub after: Duration,
}

#[derive(Default)]
pub struct Figures {
    pub reads: AtomicU64,
    /// Of those, how many began right after a write of the same register was acknowledged on another connection.
    pub right_after: AtomicU64,
    pub reads_beside: AtomicU64,
    pub writes: AtomicU64,
    pub writes_beside: AtomicU64,
    pub failed: AtomicU64,
    pub disturbances: AtomicU64,
    pub rests: AtomicU64,
    pub lost_commits: AtomicU64,
}

/// Who answered.
#[derive(Clone, Copy, Default, Debug)]
pub struct Answered {
    pub memory: i64,
    pub redis: i64,
    pub replicas: i64,
}

/// The share of writes, and where it began.
struct Pace {
    turn: usize,
    reads: u64,
    writes: u64,
}

impl Desk {
    pub async fn set_up(settings: Settings) -> Result<Desk> {
        let mut builder = Tier::builder().shards(settings.shards).replicas(settings.replicas).redis(true).peers(true);
        builder = builder.weir(settings.weir.clone()).config_extra(&settings.config);
        for (name, value) in &settings.environment {
            builder = builder.variable(name, value);
        }
        let tier = builder.start().await?;
        let client = tier.connect().await?;
        create_schema(&client).await?;
        let count = settings.registers + BESIDE;
        let ids = (0..count as i64).chain(OWN..OWN + OWN_COUNT);
        let rows: Vec<String> = ids.map(|id| format!("({id}, '0')")).collect();
        client.batch_execute(&format!("INSERT INTO users (user_id, name) VALUES {}", rows.join(", "))).await?;
        let more = vec![tier.another().await?, tier.another().await?];
        Ok(Desk {
            zipf: Zipf::new(settings.registers),
            heads: Mutex::new(vec![0; tier.shards.len()]),
            registers: std::iter::repeat_with(Register::default).take(count).collect(),
            settings,
            tier,
            more,
            still: RwLock::new(()),
            figures: Figures::default(),
            answered: Mutex::default(),
            pace: Mutex::new(Pace { turn: 0, reads: 0, writes: 0 }),
            found: Mutex::default(),
            begun: Instant::now(),
            closed: AtomicBool::new(false),
        })
    }

    pub fn proxy(&self, number: usize) -> &Proxy {
        match number % (self.more.len() + 1) {
            0 => self.tier.proxy(),
            other => &self.more[other - 1],
        }
    }

    pub fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        std::iter::once(self.tier.proxy()).chain(&self.more)
    }

    /// The servers of a shard: the primary of now, and the others.
    pub fn servers(&self, shard: usize) -> (&Server, Vec<&Server>) {
        let mut servers: Vec<&Server> = self.tier.shards[shard].servers().collect();
        let primary = servers.remove(self.heads.lock()[shard]);
        (primary, servers)
    }

    pub fn primary(&self, shard: usize) -> &Server {
        self.servers(shard).0
    }

    /// Another server of the shard has become the primary.
    pub fn promoted(&self, shard: usize, heir: &Server) {
        let number = self.tier.shards[shard].servers().position(|server| server.port() == heir.port());
        self.heads.lock()[shard] = number.unwrap_or_default();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    pub fn close(&self) {
        self.closed.store(true, SeqCst);
    }

    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub fn found(&self) -> Option<Violation> {
        self.found.lock().clone()
    }

    /// Ends the run, with what was found first.
    pub fn find(&self, what: &'static str, text: String) {
        let reads = self.figures.reads.load(SeqCst);
        self.found.lock().get_or_insert(Violation { what, text, reads, after: self.begun.elapsed() });
        self.close();
    }

    // ---- registers ----

    /// Through weir, some far more often than others.
    pub fn popular(&self, dice: &mut Dice) -> usize {
        self.zipf.pick(dice)
    }

    pub fn any(&self, dice: &mut Dice) -> usize {
        dice.roll(self.settings.registers)
    }

    pub fn beside(&self, dice: &mut Dice) -> usize {
        self.settings.registers + dice.roll(BESIDE)
    }

    pub fn is_beside(&self, register: usize) -> bool {
        register >= self.settings.registers
    }

    pub fn acknowledged(&self, register: usize, value: i64) {
        self.registers[register].acknowledged.fetch_max(value, SeqCst);
        self.figures.writes.fetch_add(1, SeqCst);
    }

    pub fn least(&self, register: usize) -> Least {
        let Register { acknowledged, read } = &self.registers[register];
        Least { acknowledged: acknowledged.load(SeqCst), read: read.load(SeqCst) }
    }

    /// A read that began when `least` was asked for has answered.
    pub fn check(&self, register: usize, least: Least, (value, how): (i64, &str)) {
        if self.is_beside(register) {
            self.figures.reads_beside.fetch_add(1, SeqCst);
            return;
        }
        if value < least.acknowledged {
            self.find("stale", format!("register {register}: {value} was read after {least:?}, {how}"));
        } else if value < least.read {
            self.find("backwards", format!("register {register}: {value} was read after {least:?}, {how}"));
        }
        self.registers[register].read.fetch_max(value, SeqCst);
        self.figures.reads.fetch_add(1, SeqCst);
    }

    // ---- how fast ----

    pub fn next_pace(&self) {
        let (reads, writes) = (self.figures.reads.load(SeqCst), self.figures.writes.load(SeqCst));
        let mut pace = self.pace.lock();
        *pace = Pace { turn: pace.turn + 1, reads, writes };
    }

    /// The share of writes that is wanted now, in percent; and may one more be written?
    pub fn may_write(&self) -> (u64, bool) {
        let (percent, reads, writes) = self.paced();
        (percent, writes * (100 - percent) <= (reads + SLACK) * percent)
    }

    pub fn may_read(&self) -> bool {
        let (percent, reads, writes) = self.paced();
        reads * percent <= (writes + SLACK) * (100 - percent)
    }

    fn paced(&self) -> (u64, u64, u64) {
        let pace = self.pace.lock();
        let percent = self.settings.writes.unwrap_or(WRITES[pace.turn % WRITES.len()]);
        let since = |count: &AtomicU64, then: u64| count.load(SeqCst).saturating_sub(then);
        (percent, since(&self.figures.reads, pace.reads), since(&self.figures.writes, pace.writes))
    }

    // ---- who answered ----

    /// Before a proxy dies, and at the end: its counters go with it.
    pub async fn count_answers(&self, proxy: &Proxy) {
        let figures = async {
            let (memory, redis) = (cache_figure(proxy, "hits_memory").await?, cache_figure(proxy, "hits_redis").await?);
            anyhow::Ok(Answered { memory, redis, replicas: crate::freshness::replica_reads_of(proxy).await? })
        };
        if let Ok(Ok(counted)) = timeout(FIGURES_MAX, figures).await {
            let mut answered = self.answered.lock();
            answered.memory += counted.memory;
            answered.redis += counted.redis;
            answered.replicas += counted.replicas;
        }
    }

    pub fn answered(&self) -> Answered {
        *self.answered.lock()
    }

    // ---- at rest ----

    /// A connection with a statement prepared; tries until there is one, or nobody wants it any more.
    pub async fn open(&self, proxy: usize, sql: &str) -> Option<(Client, Statement)> {
        while !self.is_closed() {
            let opened = timeout(PATIENCE, async {
                let client = self.proxy(proxy).connect().await?;
                let statement = client.prepare(sql).await?;
                anyhow::Ok((client, statement))
            });
            if let Ok(Ok(opened)) = opened.await {
                return Some(opened);
            }
            sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Waits until a proxy answers one of these reads from its cache, whatever was done to it. Only while all is still is it sure
    /// that it was one of these.
    pub async fn serves_again(&self, proxy: &Proxy, registers: &[usize]) -> Result<()> {
        let began = Instant::now();
        let client = proxy.connect().await?;
        let read = client.prepare(READ).await?;
        let before = cache_figure(proxy, "hits_memory").await?;
        while cache_figure(proxy, "hits_memory").await? == before {
            query_all((&client, &read), registers).await?;
            if began.elapsed() > PATIENCE {
                let (_, metrics) = proxy.http_get("/metrics").await?;
                bail!("a proxy does not answer from its cache again. Its metrics:\n{metrics}");
            }
            sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// All is held still, and every register compared through every proxy with its primary.
    pub async fn rest(&self) -> Result<()> {
        let _still = self.still.write().await;
        self.compare_all().await
    }

    /// The same, once all proxies answer from their caches again.
    pub async fn last_rest(&self) -> Result<()> {
        let _still = self.still.write().await;
        let registers: Vec<usize> = (0..BATCH).collect();
        for proxy in self.proxies() {
            self.serves_again(proxy, &registers).await?;
        }
        self.compare_all().await
    }

    async fn compare_all(&self) -> Result<()> {
        self.figures.rests.fetch_add(1, SeqCst);
        let deadline = Instant::now() + self.settings.beside_max.unwrap_or(BESIDE_MAX);
        for number in 0..=self.more.len() {
            loop {
                let Some((client, read)) = self.open(number, READ).await else { return Ok(()) };
                match self.compare((&client, &read), number, Instant::now() > deadline).await {
                    Ok(true) => break,
                    // What was written beside weir may take its time, and a server may just have been killed.
                    Ok(false) => {}
                    Err(_) if Instant::now() < deadline => {}
                    Err(error) => return Err(error),
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    /// False: what was written beside weir is not seen yet.
    async fn compare(&self, asked: (&Client, &Statement), proxy: usize, late: bool) -> Result<bool> {
        let before = self.truth().await?;
        let registers: Vec<usize> = (0..self.registers.len()).collect();
        let mut values = Vec::new();
        for part in registers.chunks(BATCH) {
            for value in query_all(asked, part).await? {
                values.push(value?);
            }
        }
        // What a dead proxy has left at work may still write.
        let after = self.truth().await?;
        for (register, value) in values.into_iter().enumerate() {
            let (least, most) = (before[&register], after[&register]);
            if (least..=most).contains(&value) {
                continue;
            }
            if self.is_beside(register) && !late {
                return Ok(false);
            }
            let who = if self.is_beside(register) { "written beside weir" } else { "written through weir" };
            let text = format!("register {register}, {who}, is {least} to {most}, and proxy {proxy} says {value}");
            self.find("left behind", text);
        }
        for (register, truth) in &after {
            let acknowledged = self.registers[*register].acknowledged.load(SeqCst);
            if *truth < acknowledged {
                self.find("lost", format!("register {register} is {truth}, and {acknowledged} was acknowledged"));
            }
        }
        Ok(true)
    }

    /// Every register as its primary has it.
    async fn truth(&self) -> Result<BTreeMap<usize, i64>> {
        let mut truth = BTreeMap::new();
        for shard in 0..self.tier.shards.len() {
            let rows = self.primary(shard).admin("shop").await?.query("SELECT user_id, name FROM users", &[]).await?;
            for row in rows.iter().filter(|row| row.get::<_, i64>(0) < OWN) {
                truth.insert(row.get::<_, i64>(0) as usize, row.get::<_, &str>(1).parse().context("a number")?);
            }
        }
        Ok(truth)
    }
}

/// The nth of all is asked for 1/n as often as the first.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(count: usize) -> Zipf {
        let sums = (1..=count).scan(0.0, |sum, nth| {
            *sum += 1.0 / nth as f64;
            Some(*sum)
        });
        Zipf(sums.collect())
    }

    fn pick(&self, dice: &mut Dice) -> usize {
        const STEPS: usize = 1 << 30;
        let all = self.0.last().copied().unwrap_or_default();
        let at = dice.roll(STEPS) as f64 / STEPS as f64 * all;
        self.0.partition_point(|sum| *sum <= at).min(self.0.len() - 1)
    }
}
