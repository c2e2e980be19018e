//! What spreading costs and gives: the same rows on one Postgres and, through weir, on 2, 4 and 8.
//!
//! Rows are copied in, then read back by statements whose answers weir puts together: whole sums, groups, the first of an order, and all
//! rows, in any order and sorted. On a machine with fewer processors than shards nothing gets faster by more shards; what is seen then is
//! what weir and the further servers cost. The baseline is the one Postgres, by the same client.
//! Non-goals: statements that need the fallback engine ([`crate::tpch`] has them), and keyed ones ([`crate::pgbench`]).

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::{BufMut as _, BytesMut};
use weir_harness::{Plain, Tier};
use weir_wire::{frame, frontend};

use crate::cost::usage;
use crate::raw::{Account, Raw};

/// How many shards are compared.
pub const SHARDS: [u32; 3] = [2, 4, 8];

const SCHEMA: &str =
    "CREATE TABLE events (user_id bigint, n bigint, kind text COLLATE \"C\", amount numeric(10,2), note text,
     PRIMARY KEY (user_id, n))";
const PIECE_BYTES: usize = 64 * 1024;

/// What is done with the rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    CopyIn,
    Sum,
    Groups,
    First,
    AllRows,
    SortedRows,
}

impl Deed {
    pub const ALL: [Deed; 6] = [Deed::CopyIn, Deed::Sum, Deed::Groups, Deed::First, Deed::AllRows, Deed::SortedRows];

    pub fn name(self) -> &'static str {
        match self {
            Deed::CopyIn => "COPY in",
            Deed::Sum => "count(*), sum(amount)",
            Deed::Groups => "100 groups with count, sum, avg",
            Deed::First => "ORDER BY … LIMIT 20",
            Deed::AllRows => "all rows",
            Deed::SortedRows => "all rows, sorted",
        }
    }

    fn sql(self) -> &'static str {
        match self {
            Deed::CopyIn => "COPY events FROM STDIN",
            Deed::Sum => "SELECT count(*), sum(amount) FROM events",
            Deed::Groups => "SELECT kind, count(*), sum(amount), avg(amount) FROM events GROUP BY kind ORDER BY kind",
            Deed::First => "SELECT * FROM events ORDER BY amount DESC, user_id, n LIMIT 20",
            Deed::AllRows => "SELECT * FROM events",
            Deed::SortedRows => "SELECT * FROM events ORDER BY n, user_id",
        }
    }
}

/// One deed on one tier, once.
#[derive(Clone, Debug)]
pub struct SpreadSample {
    pub deed: Deed,
    /// `None`: on the one Postgres.
    pub shards: Option<u32>,
    pub rows: usize,
    pub seconds: f64,
    /// Processor time of weir.
    pub proxy_seconds: f64,
}

impl fmt::Display for SpreadSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards = self.shards.map_or("one Postgres".to_owned(), |shards| format!("{shards} shards"));
        write!(f, "{}, {shards}: {:.1} ms", self.deed.name(), self.seconds * 1e3)
    }
}

/// Where the rows are.
struct Site {
    account: Account,
    shards: Option<u32>,
    weir: Option<u32>,
}

/// Every deed on one Postgres and on tiers of [`SHARDS`], each `rounds` times. One tier runs at a time, beside the one Postgres, and
/// both take turns. `weir`: the binary, if it is not the one beside us.
pub async fn run(rows: usize, rounds: u32, weir: Option<PathBuf>) -> Result<Vec<SpreadSample>> {
    let plain = Plain::start().await?;
    let one = Site { account: account(&plain.dsn())?, shards: None, weir: None };
    let mut samples = Vec::new();
    for shards in SHARDS {
        let builder = Tier::builder().shards(shards).tables(&["events(user_id bigint)"]);
        let tier = builder.config_extra("[cache]\nenabled = false").weir(weir.clone()).start().await?;
        let many = Site { account: account(&tier.dsn("shop"))?, shards: Some(shards), weir: tier.weir_pid() };
        for round in 1..=rounds {
            for site in [&one, &many] {
                made(site).await?;
            }
            for deed in Deed::ALL {
                for site in [&one, &many] {
                    let sample = done(site, deed, rows).await.with_context(|| deed.name())?;
                    eprintln!("round {round}/{rounds}: {sample}");
                    samples.push(sample);
                }
            }
        }
    }
    Ok(samples)
}

fn account(dsn: &str) -> Result<Account> {
    let config: tokio_postgres::Config = dsn.parse()?;
    let port = *config.get_ports().first().context("a port")?;
    let password = std::str::from_utf8(config.get_password().context("a password")?)?.to_owned();
    Ok(Account::new(port, "shop", "shop", &password))
}

async fn made(site: &Site) -> Result<()> {
    let mut client = Raw::login(&site.account).await?;
    client.query("DROP TABLE IF EXISTS events").await?;
    client.query(SCHEMA).await
}

async fn done(site: &Site, deed: Deed, rows: usize) -> Result<SpreadSample> {
    let mut client = Raw::login(&site.account).await?;
    client.query("SELECT 1").await?;
    let used = site.weir.map(usage).unwrap_or_default();
    let started = Instant::now();
    if deed == Deed::CopyIn {
        copy_in(&mut client, rows).await?;
    } else {
        frontend::put_query(&mut client.out, deed.sql());
        let frames = client.until_ready().await?;
        let all = matches!(deed, Deed::AllRows | Deed::SortedRows);
        // RowDescription and CommandComplete come besides.
        ensure!(!all || frames == rows + 2, "{frames} frames for {rows} rows");
    }
    let seconds = started.elapsed().as_secs_f64();
    let proxy = site.weir.map(usage).unwrap_or_default().since(used).cpu;
    if deed == Deed::CopyIn {
        client.query("ANALYZE events").await?;
        // What the servers still write of it is not the next statement's.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Ok(SpreadSample { deed, shards: site.shards, rows, seconds, proxy_seconds: proxy.as_secs_f64() })
}

async fn copy_in(client: &mut Raw, rows: usize) -> Result<()> {
    frontend::put_query(&mut client.out, Deed::CopyIn.sql());
    let (kind, _) = client.next().await?;
    ensure!(kind == weir_wire::backend::tag::COPY_IN, "no COPY");
    let mut piece = BytesMut::new();
    for row in 0..rows {
        use std::fmt::Write as _;
        let (user, kind) = (row * 7919 % (rows / 10 + 1), row % 100);
        writeln!(
            piece,
            "{user}\t{row}\tkind{kind:02}\t{}.{:02}\tsomething that was said of event {row}",
            row % 9973,
            row % 100
        )?;
        if piece.len() > PIECE_BYTES || row + 1 == rows {
            frame::put(&mut client.out, frontend::tag::COPY_DATA, |out| out.put(piece.split()));
            client.flush().await?;
        }
    }
    frame::put(&mut client.out, frontend::tag::COPY_DONE, |_| {});
    client.until_ready().await?;
    Ok(())
}
