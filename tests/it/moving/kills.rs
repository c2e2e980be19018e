//! Whatever dies at whatever phase of a move, nothing is lost: one victim at one boundary in each round, under a crowd of clients.
//!
//! `make test` runs a few rounds of a new seed, which is printed. A long run, whose last lines are a table of victims and phases:
//!
//! ```text
//! WEIR_MOVING_ROUNDS=500 WEIR_MOVING_SEED=7 cargo test -p weir-tests --test it -- --nocapture whatever_dies
//! ```
//!
//! `WEIR_MOVING_VICTIM=hub` and `WEIR_MOVING_PHASE=cutover` keep to one of them. With every second seed the accounts have holders that are
//! unique over all shards.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls};
use weir_harness::{Proxy, Tier};

use super::crowd::{ACCOUNTS, Crowd, TABLE, UNIQUE, decided, ledger};
use super::{SLOTS, nothing_is_left};
use crate::differential::Dice;
use crate::freshness::until;
use crate::placement::column;

/// Rounds where nothing else is said.
const ROUNDS: usize = 2;
/// For a move to come to an end, whatever has died meanwhile.
const WAIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

const PHASES: [&str; 10] =
    ["prepare", "copy", "catchup", "verify", "ready", "cutover", "reverse", "cutback", "clear_target", "clear_source"];

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Victim {
    /// The proxy that drives the move.
    Mover,
    /// Another one.
    Proxy,
    Source,
    Target,
    Hub,
    /// Of the source.
    Replica,
    Redis,
}

const VICTIMS: [Victim; 7] =
    [Victim::Mover, Victim::Proxy, Victim::Source, Victim::Target, Victim::Hub, Victim::Replica, Victim::Redis];

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Victim::Mover => "mover",
            Victim::Proxy => "proxy",
            Victim::Source => "source",
            Victim::Target => "target",
            Victim::Hub => "hub",
            Victim::Replica => "replica",
            Victim::Redis => "redis",
        }
    }

    /// May what runs on it be of unknown end, for a client whose own proxy lives?
    fn is_server(self) -> bool {
        matches!(self, Victim::Source | Victim::Target)
    }
}

/// Where a move is to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Cancelled,
    RolledBack,
    Done,
}

/// The phases of moves as the hub commits them.
pub struct Phases {
    heard: mpsc::UnboundedReceiver<String>,
}

impl Phases {
    /// Has every change of a phase told.
    pub async fn listen(dsn: String) -> Result<Phases> {
        let hub = weir_harness::connect(&dsn).await?;
        hub.batch_execute(
            "CREATE FUNCTION public.tell() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN PERFORM pg_notify('weir_test', NEW.phase); RETURN NULL; END$$; \
             CREATE TRIGGER tell AFTER UPDATE OF phase ON weir.move FOR EACH ROW EXECUTE FUNCTION public.tell()",
        )
        .await?;
        let (tell, heard) = mpsc::unbounded_channel();
        let ready = std::sync::Arc::new(tokio::sync::Notify::new());
        let listens = std::sync::Arc::clone(&ready);
        tokio::spawn(async move {
            while !tell.is_closed() {
                let _ = hear(&dsn, &tell, &listens).await;
                tokio::time::sleep(POLL).await;
            }
        });
        ready.notified().await;
        Ok(Phases { heard })
    }

    fn forget(&mut self) {
        while self.heard.try_recv().is_ok() {}
    }

    pub async fn reaches(&mut self, phase: &str) -> Result<()> {
        let heard = async { while self.heard.recv().await.is_some_and(|heard| heard != phase) {} };
        tokio::time::timeout(WAIT, heard).await.with_context(|| format!("{phase} was never reached"))
    }
}

async fn hear(dsn: &str, tell: &mpsc::UnboundedSender<String>, listens: &tokio::sync::Notify) -> Result<()> {
    let (client, mut connection) = tokio_postgres::connect(dsn, NoTls).await?;
    let mut messages = futures_util::stream::poll_fn(move |task| connection.poll_message(task));
    let asked = async {
        client.batch_execute("LISTEN weir_test").await?;
        listens.notify_one();
        std::future::pending::<Result<()>>().await
    };
    let told = async {
        while let Some(message) = messages.next().await {
            if let AsyncMessage::Notification(told) = message? {
                tell.send(told.payload().to_owned())?;
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = asked => ended,
        ended = told => ended,
    }
}

/// Everything a round needs.
struct Desk {
    tier: Tier,
    lives: Proxy,
    dies: [Proxy; 2],
    crowd: Crowd,
    phases: Phases,
    /// Index of the shard that has the slots.
    owner: usize,
    /// Holders are unique over all shards.
    unique: bool,
}

impl Desk {
    async fn set(unique: bool) -> Result<Desk> {
        let table = [TABLE, if unique { UNIQUE } else { "" }].concat();
        let tier = Tier::builder().shards(2).replicas(1).redis(true).peers(true).config_extra(&table).start().await?;
        let (lives, dies) = (tier.another().await?, [tier.another().await?, tier.another().await?]);
        ledger(&tier).await?;
        if unique {
            let home = tier.shards[0].primary.admin("shop").await?;
            until(async || Ok(column(&home, "SELECT state FROM weir.unique_rule").await? == ["valid"])).await?;
            // Each has to have seen it.
            for proxy in dies.iter().chain([&lives]) {
                let client = weir_harness::connect(&proxy.dsn("shop")).await?;
                let writes = "UPDATE ledger SET added = added WHERE user_id = 1";
                until(async || Ok(client.batch_execute(writes).await.is_ok())).await?;
            }
        }
        tier.stop_weir();
        let others: Vec<String> = dies.iter().map(|proxy| proxy.dsn("shop")).collect();
        let crowd = Crowd::gather(&lives.dsn("shop"), &others).await?;
        let phases = Phases::listen(tier.hub.admin_dsn("weir_hub")).await?;
        Ok(Desk { tier, lives, dies, crowd, phases, owner: 0, unique })
    }

    async fn hub(&self) -> Result<Client> {
        self.tier.hub.admin("weir_hub").await
    }

    /// Says something to the moves, again while nobody can hear it or it does not fit yet.
    async fn say(&self, command: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let said = async {
                let console = weir_harness::connect(&self.lives.admin_dsn()).await?;
                anyhow::Ok(console.simple_query(command).await?)
            };
            match said.await {
                Ok(_) => return Ok(()),
                Err(error) if begun.elapsed() > WAIT => return Err(error.context(command.to_owned())),
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Waits until the last move is in this phase; says what it waits for meanwhile if it was lost.
    async fn reaches(&self, phase: &str) -> Result<()> {
        let begun = Instant::now();
        let mut last = String::new();
        while begun.elapsed() < WAIT {
            ensure!(self.crowd.is_well(), "a client has stopped");
            let asked = async {
                let hub = self.hub().await?;
                column(&hub, "SELECT phase || ': ' || coalesce(error, '') FROM weir.move ORDER BY id DESC LIMIT 1")
                    .await
            };
            if let Ok(found) = asked.await {
                last = found.into_iter().next().unwrap_or_default();
                if last.starts_with(&format!("{phase}:")) {
                    return Ok(());
                }
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("the move did not reach {phase}; it is in {last}\n{}", self.lives.weir_log())
    }

    async fn travel(&self, end: End, dice: &mut Dice) -> Result<()> {
        if end == End::Cancelled {
            self.reaches("ready").await?;
            self.say("RESHARD CANCEL").await?;
            return self.reaches("cancelled").await;
        }
        self.say("RESHARD CUTOVER").await?;
        self.reaches("reverse").await?;
        tokio::time::sleep(Duration::from_millis(dice.roll(200) as u64)).await;
        let (order, last) =
            if end == End::Done { ("RESHARD COMPLETE", "done") } else { ("RESHARD ROLLBACK", "rolled_back") };
        self.say(order).await?;
        self.reaches(last).await
    }

    /// Which of the proxies that may die drives the moves; one that lives must not.
    async fn mover(&self) -> Result<usize> {
        let hub = self.hub().await?;
        let begun = Instant::now();
        while begun.elapsed() < WAIT {
            match driver(&hub, &[&self.dies[0], &self.dies[1], &self.lives]).await? {
                Some((2, pid)) => drop(hub.execute("SELECT pg_terminate_backend($1)", &[&pid]).await?),
                Some((found, _)) => return Ok(found),
                None => {}
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("nobody drives the moves")
    }

    /// Strikes at the boundary, and mends.
    async fn strike(&self, victim: Victim, mover: usize, down: Duration) -> Result<()> {
        let tier = &self.tier;
        let (source, target) = (&tier.shards[self.owner], &tier.shards[1 - self.owner]);
        if let Victim::Mover | Victim::Proxy = victim {
            let proxy = &self.dies[if victim == Victim::Mover { mover } else { 1 - mover }];
            proxy.kill_weir();
            tokio::time::sleep(down).await;
            return proxy.restart_weir().await;
        }
        if let Victim::Redis = victim {
            let redis = tier.redis.as_ref().context("there is one")?;
            redis.kill9();
            tokio::time::sleep(down).await;
            return redis.restart().await;
        }
        let server: &weir_harness::Server = match victim {
            Victim::Source => &source.primary,
            Victim::Target => &target.primary,
            Victim::Replica => &source.replicas[0],
            _ => &tier.hub,
        };
        server.kill9();
        tokio::time::sleep(down).await;
        server.restart().await
    }

    /// One move, with one death in it. The longest that a single statement has taken meanwhile.
    async fn round(&mut self, victim: Victim, phase: &'static str, dice: &mut Dice) -> Result<Duration> {
        let end = match phase {
            "cutback" => End::RolledBack,
            "clear_source" => End::Done,
            "clear_target" => dice.pick(&[End::RolledBack, End::Cancelled]),
            _ => dice.pick(&[End::RolledBack, End::Done]),
        };
        self.phases.forget();
        self.crowd.weather.slowest();
        let target = &self.tier.shards[1 - self.owner].name;
        self.crowd.weather.storm.store(victim.is_server(), SeqCst);
        self.say(&format!("RESHARD START MOVE SLOTS {SLOTS} TO {target}")).await?;
        let after = Duration::from_millis(if dice.percent(70) { dice.roll(20) } else { dice.roll(300) } as u64);
        let down = Duration::from_millis(dice.roll(1000) as u64);
        let mut phases = std::mem::replace(&mut self.phases, Phases { heard: mpsc::unbounded_channel().1 });
        let mover = self.mover().await?;
        let striking = async {
            // Prepare may have begun while the mover was found.
            if phase != "prepare" {
                phases.reaches(phase).await?;
            }
            tokio::time::sleep(after).await;
            self.strike(victim, mover, down).await.with_context(|| format!("{} dies", victim.name()))
        };
        let mut own = Dice::new(dice.roll(usize::MAX) as u64);
        let both = tokio::try_join!(striking, self.travel(end, &mut own));
        self.phases = phases;
        both?;
        if end == End::Done {
            self.owner = 1 - self.owner;
        }
        self.stands().await?;
        self.crowd.weather.storm.store(false, SeqCst);
        ensure!(self.crowd.is_well(), "a client has stopped");
        Ok(self.crowd.weather.slowest())
    }

    /// What the proxies say of themselves, for whoever has to find out why.
    async fn tell(&self) {
        for proxy in [&self.lives, &self.dies[0], &self.dies[1]] {
            let page = proxy.http_get("/metrics").await.map_or_else(|error| error.to_string(), |(_, page)| page);
            let lines = page.lines().filter(|line| ["clock", "peer", "moves"].iter().any(|word| line.contains(word)));
            let lines: Vec<&str> = lines.filter(|line| !line.starts_with('#') && !line.ends_with(" 0")).collect();
            println!("port {}:\n{}", proxy.port(), lines.join("\n"));
        }
    }

    /// No row is where it does not belong, none is missing, and nothing of the move is left.
    async fn stands(&self) -> Result<()> {
        decided(&self.tier).await?;
        let mut count = 0;
        for (index, shard) in self.tier.shards.iter().enumerate() {
            let owned = format!("SELECT slot::text FROM weir.slot WHERE shard = {index}");
            let slots = column(&self.hub().await?, &owned).await?.join(",");
            let direct = shard.primary.admin("shop").await?;
            let slot = "(hashint8extended(user_id, 0) >> 52) & 4095";
            let sql = format!(
                "SELECT count(*) FILTER (WHERE user_id <= {ACCOUNTS}), count(*) FILTER (WHERE {slot} <> ALL ('{{{slots}}}')) FROM ledger"
            );
            let row = direct.query_one(&sql, &[]).await?;
            count += row.get::<_, i64>(0);
            ensure!(row.get::<_, i64>(1) == 0, "{} rows are not {}'s", row.get::<_, i64>(1), shard.name);
            if self.unique {
                let slot = "(hashtextextended(value, 0) >> 52) & 4095";
                let sql = format!("SELECT value FROM weir.unique_value WHERE {slot} <> ALL ('{{{slots}}}')");
                let strange = column(&direct, &sql).await?;
                ensure!(strange.is_empty(), "the values {strange:?} are not {}'s", shard.name);
            }
        }
        ensure!(count == ACCOUNTS, "{count} accounts are there");
        nothing_is_left(&self.tier).await
    }
}

/// Every account's holder is known where its slot is, and none that is gone.
async fn holders_are_known(tier: &Tier) -> Result<()> {
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        rows.extend(column(&direct, "SELECT holder FROM ledger").await?);
        values.extend(column(&direct, "SELECT value FROM weir.unique_value").await?);
    }
    rows.sort_unstable();
    values.sort_unstable();
    ensure!(rows == values, "holders {rows:?}, known are {values:?}");
    Ok(())
}

/// Which of these proxies drives the moves, and by which process of the hub.
pub async fn driver(hub: &Client, proxies: &[&Proxy]) -> Result<Option<(usize, i32)>> {
    let sql = "SELECT a.pid, a.client_port FROM pg_stat_activity a JOIN pg_locks l USING (pid) \
               WHERE l.locktype = 'advisory' AND l.granted AND l.classid = x'776d6f76'::int";
    let Some(row) = hub.query_opt(sql, &[]).await? else { return Ok(None) };
    let (pid, port): (i32, i32) = (row.get(0), row.get(1));
    Ok(proxies.iter().position(|proxy| owns_port(proxy, port)).map(|found| (found, pid)))
}

/// Is this end of a connection the proxy's?
fn owns_port(proxy: &Proxy, port: i32) -> bool {
    let Some(pid) = proxy.weir_pid() else { return false };
    let port = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let inodes: Vec<String> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.get(1).is_some_and(|local| local.ends_with(&port)))
        .filter_map(|words| words.get(9).map(|inode| format!("socket:[{inode}]")))
        .collect();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|to| inodes.iter().any(|one| *to == **one))
}

/// Runs and the slowest statement of each pair.
type Table = BTreeMap<(Victim, usize), (u32, Duration)>;

fn print(table: &Table) {
    println!("{:14}{}", "", VICTIMS.map(|victim| format!("{:>13}", victim.name())).concat());
    for (number, phase) in PHASES.iter().enumerate() {
        let cell = |victim| match table.get(&(victim, number)) {
            Some((runs, slowest)) => format!("{:>13}", format!("{runs}: {} ms", slowest.as_millis())),
            None => format!("{:>13}", "-"),
        };
        println!("{phase:14}{}", VICTIMS.map(cell).concat());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_at_whatever_phase_nothing_is_lost() -> Result<()> {
    let given = |name: &str| std::env::var(name).ok();
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    let seed = given("WEIR_MOVING_SEED").and_then(|text| text.parse().ok()).unwrap_or(fresh);
    let rounds = given("WEIR_MOVING_ROUNDS").and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    println!("WEIR_MOVING_SEED={seed} WEIR_MOVING_ROUNDS={rounds}");
    let victims: Vec<Victim> =
        VICTIMS.into_iter().filter(|one| given("WEIR_MOVING_VICTIM").is_none_or(|name| name == one.name())).collect();
    let phases: Vec<usize> =
        (0..PHASES.len()).filter(|one| given("WEIR_MOVING_PHASE").is_none_or(|name| name == PHASES[*one])).collect();
    ensure!(!victims.is_empty() && !phases.is_empty(), "there is no such victim or phase");
    let mut cells: Vec<(Victim, usize)> =
        victims.iter().flat_map(|victim| phases.iter().map(|phase| (*victim, *phase))).collect();
    let mut desk = Desk::set(seed % 2 == 1).await?;
    let (mut dice, mut table) = (Dice::new(seed), Table::new());
    let mut failed = Ok(());
    for round in 0..rounds {
        let at = round % cells.len();
        // All of them once, in another order each time.
        if at == 0 {
            (1..cells.len()).rev().for_each(|last| cells.swap(last, dice.roll(last + 1)));
        }
        let (victim, phase) = cells[at];
        let begun = Instant::now();
        let done = desk.round(victim, PHASES[phase], &mut dice).await;
        let what = format!("round {round}: {} dies at {}", victim.name(), PHASES[phase]);
        match done {
            Ok(slowest) => {
                println!("{what}: {:?}, slowest statement {slowest:?}", begun.elapsed());
                let cell = table.entry((victim, phase)).or_default();
                *cell = (cell.0 + 1, cell.1.max(slowest));
            }
            Err(error) => {
                failed = Err(error.context(format!("seed {seed}, {what}")));
                break;
            }
        }
    }
    print(&table);
    if failed.is_err() {
        desk.tell().await;
    }
    let Desk { crowd, tier, unique, .. } = desk;
    let known = crowd.disperse(&tier).await;
    // What a client has seen tells more than that the round did not end.
    known.with_context(|| format!("seed {seed}; {failed:?}"))?;
    if unique {
        holders_are_known(&tier).await.with_context(|| format!("seed {seed}; {failed:?}"))?;
    }
    failed
}
