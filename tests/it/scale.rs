//! What a crowd, a slow reader and a flood of statements may not do: go unanswered, or make weir grow.
//!
//! Bounds only; how fast it all is, `make bench` says.

use anyhow::{Context, Result, bail, ensure};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use weir_harness::Tier;
use weir_wire::backend::tag;
use weir_wire::frontend::{self, Execute, Object, Parse, Target, put_query, put_sync};

use crate::raw::Raw;

/// Longest wait for the next piece of a result.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Resident memory of the tier's weir (VmRSS of proc(5)).
fn resident_bytes(tier: &Tier) -> Result<u64> {
    let pid = tier.weir_pid().context("weir runs")?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.split_whitespace().next().context("a number")?.parse()?;
    Ok(kib * 1024)
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_clients_share_five_server_connections() -> Result<()> {
    const CLIENTS: usize = 500;
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 5\nwait_max = \"60s\"").start().await?;
    let mut logins = JoinSet::new();
    for number in 0..CLIENTS {
        let dsn = tier.dsn("shop");
        logins.spawn(async move { Ok::<_, anyhow::Error>((number, Raw::login(&dsn, &[]).await?)) });
    }
    let mut clients = Vec::new();
    while let Some(client) = logins.join_next().await {
        clients.push(client??);
    }
    let mut questions = JoinSet::new();
    for (number, mut client) in clients {
        questions.spawn(async move {
            for round in 0..4 {
                // Longer than a moment, so that clients do queue; in a transaction too.
                let sql = if round == 2 { "BEGIN" } else { "SELECT 1 FROM pg_sleep(0.002)" };
                client.query(sql).await?;
                let (tags, values) = client.query(&format!("SELECT {number} + {round}")).await?;
                ensure!(
                    (tags.as_str(), values.as_slice()) == ("TDCZ", &[(number + round).to_string()][..]),
                    "{values:?}"
                );
                client.query("COMMIT").await?;
            }
            Ok(())
        });
    }
    let mut answered = 0;
    while let Some(result) = questions.join_next().await {
        result??;
        answered += 1;
    }
    assert_eq!(answered, CLIENTS);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_does_not_make_weir_grow() -> Result<()> {
    const RESULT_BYTES: u64 = 200_000_000;
    // An allocator's arenas and huge pages move a resident size by several MB whatever is relayed; a result that is
    // kept would move it by all of its size.
    const GROWTH_BYTES_MAX: u64 = RESULT_BYTES / 8;
    let tier = Tier::builder().shards(1).start().await?;
    for (sql, first) in [
        ("COPY (SELECT repeat('x', 999) FROM generate_series(1, 200000)) TO STDOUT", tag::COPY_OUT),
        ("SELECT repeat('x', 999) FROM generate_series(1, 200000)", tag::ROW_DESCRIPTION),
        ("SELECT repeat('x', 200000000)", tag::ROW_DESCRIPTION),
    ] {
        let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
        client.query("SELECT 1").await?;
        let before = resident_bytes(&tier)?;
        put_query(&mut client.out, sql);
        let (kind, _) = client.next().await?;
        assert_eq!(kind, first, "{sql}");
        // The first tenth is read bit by bit, each time only when what weir can have sent ahead is there.
        let mut most = before;
        let mut piece = vec![0; 64 * 1024];
        let mut read = client.stream_mut().read(&mut piece).await? as u64;
        // What came along with the first frame was not counted here.
        while read < RESULT_BYTES * 9 / 10 {
            if read < RESULT_BYTES / 10 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            most = most.max(resident_bytes(&tier)?);
            let more = tokio::time::timeout(PATIENCE, client.stream_mut().read(&mut piece)).await??;
            if more == 0 {
                bail!("{sql}: closed after {read} bytes");
            }
            read += more as u64;
        }
        let grown = most - before;
        assert!(grown < GROWTH_BYTES_MAX, "{sql}: grew by {grown} bytes");
    }
    Ok(())
}

/// A pipeline of statements `from..to` that have never been sent before.
fn put_statements(client: &mut Raw, from: usize, to: usize, close: bool) {
    for number in from..to {
        let (name, sql) = (format!("s{number}"), format!("SELECT 1 AS c{number}"));
        let out = &mut client.out;
        Parse { name: name.as_bytes(), sql: sql.as_bytes(), types: b"" }.put(out);
        weir_wire::frame::put(out, frontend::tag::BIND, |out| {
            weir_wire::frame::put_cstr(out, b"");
            weir_wire::frame::put_cstr(out, name.as_bytes());
            out.extend_from_slice(&[0; 6]);
        });
        Execute { portal: b"", rows_max: 0 }.put(out);
        if close {
            Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::CLOSE, out);
        }
    }
    put_sync(&mut client.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_that_are_never_repeated_do_not_pile_up() -> Result<()> {
    const STATEMENTS: usize = 20_000;
    let extra = "[limits]\nprepared_per_server_max = 100";
    let tier = Tier::builder().shards(1).config_extra(extra).start().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    let mut sizes = Vec::new();
    for from in (0..3 * STATEMENTS).step_by(100) {
        put_statements(&mut client, from, from + 100, true);
        let (tags, _) = client.until_ready().await?;
        ensure!(tags == format!("{}Z", "12DC3".repeat(100)), "{tags}");
        if from % STATEMENTS == STATEMENTS - 100 {
            sizes.push(resident_bytes(&tier)?);
        }
    }
    // The caches are full after some 30,000; whatever comes then must find its room there.
    let grown = sizes[2].saturating_sub(sizes[1]);
    assert!(grown < 8_000_000, "grew by {grown} bytes: {sizes:?}");
    // The server keeps no more than it may, either.
    let (_, values) = client.query("SELECT count(*) FROM pg_prepared_statements").await?;
    let kept: usize = values.first().context("a count")?.parse()?;
    assert!(kept <= 100, "{kept} statements are prepared on the server");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_that_are_kept_cost_little_and_have_an_end() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    put_statements(&mut client, 0, 100, false);
    client.until_ready().await?;
    let before = resident_bytes(&tier)?;
    for from in (100..20_100).step_by(100) {
        put_statements(&mut client, from, from + 100, false);
        let (tags, _) = client.until_ready().await?;
        ensure!(tags == format!("{}Z", "12DC".repeat(100)), "{tags}");
    }
    let grown = resident_bytes(&tier)?.saturating_sub(before);
    assert!(grown < 60_000_000, "20,000 kept statements cost {grown} bytes");
    // All are still there; the first one is prepared again on the server without the client seeing it.
    weir_wire::frame::put(&mut client.out, frontend::tag::BIND, |out| out.extend_from_slice(b"\0s0\0\0\0\0\0\0\0"));
    Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "2DCZ");
    // Nobody can keep texts for ever: the limit of one session is an error that says so.
    for number in 0.. {
        let sql = format!("SELECT {number} /* {} */", "x".repeat(1_000_000));
        Parse { name: format!("large{number}").as_bytes(), sql: sql.as_bytes(), types: b"" }.put(&mut client.out);
        put_sync(&mut client.out);
        let (tags, bodies) = client.until_ready().await?;
        if tags == "EZ" {
            let text = crate::raw::error_text(&bodies[0]);
            assert!(text.starts_with("54000 too many prepared statements"), "{text}");
            break;
        }
        ensure!(number < 200, "200 MB of statements were taken");
    }
    Ok(())
}
