//! Clients that mean harm, or are broken: whatever they send, others are served right, memory stays bounded and nothing panics.
//!
//! Every test keeps an honest session at work meanwhile ([`Honest`]) and ends with [`unharmed`]: no Backend is out on loan,
//! weir's memory is bounded, its log has no panic, and it still serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_postgres::SimpleQueryMessage;
use weir_harness::Tier;
use weir_wire::backend::tag as server;
use weir_wire::frontend::{Execute, Object, Parse, Target, put_flush, put_query, put_sync, put_terminate, tag};
use weir_wire::{frame, startup};

use crate::raw::Raw;

/// Longest wait for weir to react; only a bug reaches it.
const PATIENCE: Duration = Duration::from_secs(30);
/// weir's resident memory may grow by this much during a test, whatever its clients claim or send.
const GROWTH_KIB_MAX: u64 = 96 * 1024;

/// A session that keeps checking that it gets its own answers.
struct Honest {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<u64>>,
}

impl Honest {
    async fn start(tier: &Tier) -> Result<Honest> {
        let client = tier.connect().await?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut served = 0;
            while !stopped.load(Relaxed) || served == 0 {
                let row =
                    client.query_one("SELECT $1::int8 * 2, 'own'", &[&served]).await.context("an honest client")?;
                assert_eq!((row.get::<_, i64>(0), row.get::<_, &str>(1)), (served * 2, "own"));
                served += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(served as u64)
        });
        Ok(Honest { stop, task })
    }

    async fn finish(self) -> Result<()> {
        self.stop.store(true, Relaxed);
        let served = tokio::time::timeout(PATIENCE, self.task).await.context("an honest client hangs")???;
        assert!(served > 0);
        Ok(())
    }
}

/// Resident memory of weir, KiB.
fn memory_kib(tier: &Tier) -> Result<u64> {
    let pid = tier.weir_pid().context("weir runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

/// Backends on loan and clients waiting, by SHOW POOLS.
async fn on_loan(tier: &Tier) -> Result<u64> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let mut sum = 0;
    for message in console.simple_query("SHOW POOLS").await? {
        if let SimpleQueryMessage::Row(row) = message {
            for column in ["sv_active", "cl_waiting"] {
                sum += row.get(column).context("a column of SHOW POOLS")?.parse::<u64>()?;
            }
        }
    }
    Ok(sum)
}

async fn unharmed(tier: &Tier, honest: Honest, before_kib: u64) -> Result<()> {
    honest.finish().await?;
    let start = Instant::now();
    while on_loan(tier).await? > 0 {
        assert!(start.elapsed() < PATIENCE, "a Backend is still on loan, or a client waits");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = tier.weir_log();
    assert!(!log.contains("panicked"), "{log}");
    let row = tier.connect().await?.query_one("SELECT 'alive'", &[]).await?;
    assert_eq!(row.get::<_, &str>(0), "alive");
    let after_kib = memory_kib(tier)?;
    assert!(after_kib < before_kib + GROWTH_KIB_MAX, "memory grew from {before_kib} to {after_kib} KiB");
    Ok(())
}

async fn dial(tier: &Tier) -> Result<TcpStream> {
    Ok(TcpStream::connect(("127.0.0.1", tier.port())).await?)
}

/// Reads until weir closes; what it said. Errors: it does not close.
async fn until_closed(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut said = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await;
    // A reset is a close, too.
    closed.with_context(|| format!("the connection stays open after {:?}", said.escape_ascii().to_string()))?.ok();
    Ok(said)
}

fn hello(tier: &Tier) -> BytesMut {
    let _ = tier;
    let mut out = BytesMut::new();
    startup::put_startup(&mut out, &[("user", "shop"), ("database", "shop")]);
    out
}

/// A conversation that touches every kind of message: what a client sends after login, message by message.
fn conversation() -> Vec<BytesMut> {
    let message = |write: &dyn Fn(&mut BytesMut)| {
        let mut out = BytesMut::new();
        write(&mut out);
        out
    };
    vec![
        message(&|out| put_query(out, "SELECT 1; SELECT 2")),
        message(&|out| put_query(out, "BEGIN")),
        message(&|out| {
            Parse { name: b"s", sql: b"SELECT generate_series(1, $1::int)", types: &[0, 0, 0, 23] }.put(out);
        }),
        message(&|out| {
            frame::put(out, tag::BIND, |out| out.extend_from_slice(b"p\0s\0\0\0\0\x01\0\0\0\x019\0\0"));
        }),
        message(&|out| Target { object: Object::Portal, name: b"p" }.put(tag::DESCRIBE, out)),
        message(&|out| Execute { portal: b"p", rows_max: 3 }.put(out)),
        message(&|out| put_flush(out)),
        message(&|out| Execute { portal: b"p", rows_max: 0 }.put(out)),
        message(&|out| Target { object: Object::Portal, name: b"p" }.put(tag::CLOSE, out)),
        message(&|out| put_sync(out)),
        message(&|out| put_query(out, "INSERT INTO victims VALUES (1)")),
        message(&|out| put_query(out, "COPY victims FROM STDIN")),
        message(&|out| frame::put(out, tag::COPY_DATA, |out| out.extend_from_slice(b"2\n3\n"))),
        message(&|out| frame::put(out, tag::COPY_DATA, |out| out.extend_from_slice(b"4\n"))),
        message(&|out| frame::put(out, tag::COPY_DONE, |_| {})),
        message(&|out| {
            frame::put(out, tag::FUNCTION_CALL, |out| {
                out.extend_from_slice(b"\0\0\x05\x25\0\0\0\x01\0\0\0\x04four\0\0");
            });
        }),
        message(&|out| put_query(out, "SELECT pg_advisory_lock(1)")),
        message(&|out| put_query(out, "CREATE TEMP TABLE mine (a int)")),
        message(&|out| put_query(out, "SELECT pg_sleep(0.01)")),
        message(&|out| put_query(out, "ROLLBACK")),
        message(&put_terminate),
    ]
}

async fn victims(tier: &Tier) -> Result<i64> {
    let admin = tier.shards[0].primary.admin("shop").await?;
    Ok(admin.query_one("SELECT count(*) FROM victims", &[]).await?.get(0))
}

async fn tier(config: &str) -> Result<Tier> {
    let tier = Tier::builder().shards(2).config_extra(config).start().await?;
    tier.connect().await?.batch_execute("CREATE TABLE victims (a int)").await?;
    Ok(tier)
}

/// The connection ends between any two messages: a transaction, a copy or a pin dies with it, and its Backend is closed or clean.
#[tokio::test(flavor = "multi_thread")]
async fn disconnects_at_every_message() -> Result<()> {
    let tier = tier("[pool]\nsize = 3").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let messages = conversation();
    for end in 0..messages.len() {
        for patient in [false, true] {
            let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
            for message in &messages[..end] {
                raw.out.extend_from_slice(message);
                raw.flush().await?;
                if patient {
                    // Lets weir get to where it waits for the next message.
                    let _ = tokio::time::timeout(Duration::from_millis(5), raw.next()).await;
                }
            }
            drop(raw);
        }
    }
    unharmed(&tier, honest, before).await?;
    assert_eq!(victims(&tier).await?, 0, "what was not committed is gone");
    Ok(())
}

/// The stream ends inside a message, at every byte; and half-closed sockets get their answers.
#[tokio::test(flavor = "multi_thread")]
async fn truncations_at_every_byte() -> Result<()> {
    let tier = tier("[pool]\nsize = 3").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let hello = hello(&tier);
    for end in 0..hello.len() {
        let mut stream = dial(&tier).await?;
        stream.write_all(&hello[..end]).await?;
        stream.shutdown().await?;
        assert!(until_closed(&mut stream).await?.is_empty(), "an answer to {end} bytes of a startup packet");
    }
    let all: Vec<u8> = conversation().concat();
    let (mut sessions, mut at) = (Vec::new(), 0);
    while at < all.len() {
        let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        raw.out.extend_from_slice(&all[..at]);
        raw.flush().await?;
        raw.half_close().await?;
        sessions.push(raw);
        if sessions.len() >= 20 {
            for mut raw in sessions.drain(..) {
                assert!(raw.closed().await);
            }
        }
        at += 1;
    }
    for mut raw in sessions {
        assert!(raw.closed().await);
    }
    unharmed(&tier, honest, before).await?;
    assert_eq!(victims(&tier).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lengths_that_lie() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"2s\"\nmessage_bytes_max = \"1MiB\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let lengths: [u32; 9] = [0, 1, 3, 7, 10_001, 0x7fff_ffff, 0x8000_0000, 0xffff_fffb, 0xffff_ffff];
    for length in lengths {
        let mut stream = dial(&tier).await?;
        stream.write_all(&length.to_be_bytes()).await?;
        stream.write_all(b"\0\x03\0\0user\0shop\0\0").await?;
        assert!(!until_closed(&mut stream).await?.starts_with(b"R"), "startup of {length}");
        for kind in *b"PBDECQFSHXdcfp?\0\xff" {
            // Lengths that a message may have would make weir wait for it.
            if (4..1 << 20).contains(&length) {
                continue;
            }
            let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
            raw.out.extend_from_slice(&[kind]);
            raw.out.extend_from_slice(&length.to_be_bytes());
            raw.out.extend_from_slice(b"some bytes");
            assert!(raw.closed().await, "{} of {length}", char::from(kind));
        }
    }
    // One byte more than allowed is told so; as much as allowed is served.
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    let fits = format!("SELECT length('{}')", "x".repeat((1 << 20) - 24));
    assert_eq!(raw.query(&fits).await?.1, [((1 << 20) - 24).to_string()]);
    put_query(&mut raw.out, &format!("SELECT '{}'", "x".repeat(1 << 20)));
    let (kind, body) = raw.next().await?;
    assert_eq!((kind, &crate::raw::error_text(&body)[..5]), (server::ERROR, "54000"));
    assert!(raw.closed().await);
    unharmed(&tier, honest, before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_around_a_tls_request() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"1s\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let ssl = b"\0\0\0\x08\x04\xd2\x16\x2f";
    let gss = b"\0\0\0\x08\x04\xd2\x16\x30";
    let hello = hello(&tier);
    // Smuggled behind the request, in one packet: nothing of it may be taken for what comes after the answer.
    for smuggled in [&hello[..], b"x", b"\x16\x03\x01\0\x05hello", ssl] {
        let mut stream = dial(&tier).await?;
        stream.write_all(&[&ssl[..], smuggled].concat()).await?;
        let said = until_closed(&mut stream).await?;
        assert!(!said.contains(&b'R'), "{smuggled:?} was interpreted: {said:?}");
    }
    // Bytes of TLS, or of anything else, where a request is due.
    for early in
        [&b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"[..], b"\x80\0\0\0", b"\0\0\0\x08", b"GET / HTTP/1.0\r\n\r\n"]
    {
        let mut stream = dial(&tier).await?;
        stream.write_all(early).await?;
        assert!(!until_closed(&mut stream).await?.starts_with(b"R"));
    }
    // Asked one after the other, each is answered once, and then a login goes on as usual.
    let mut stream = dial(&tier).await?;
    for request in [&ssl[..], gss] {
        stream.write_all(request).await?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await?;
        assert_eq!(&answer, b"N");
    }
    stream.write_all(&hello).await?;
    let mut answer = [0];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"R");
    // Asked without end, it ends.
    let mut stream = dial(&tier).await?;
    let start = Instant::now();
    while stream.write_all(gss).await.is_ok() {
        assert!(start.elapsed() < PATIENCE, "requests for encryption are answered for ever");
        let mut answer = [0];
        if !matches!(stream.read(&mut answer).await, Ok(1)) {
            break;
        }
    }
    unharmed(&tier, honest, before).await
}

/// Bytes that come one at a time, or never: a login has only so long.
#[tokio::test(flavor = "multi_thread")]
async fn slow_logins_are_cut_off() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"1s\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let hello = hello(&tier).freeze();
    let mut slow = Vec::new();
    for number in 0..100_usize {
        let (mut stream, hello) = (dial(&tier).await?, hello.clone());
        slow.push(tokio::spawn(async move {
            let start = Instant::now();
            // Some send a whole startup packet and then nothing, some a byte now and then, some nothing at all.
            match number % 3 {
                0 => stream.write_all(&hello).await?,
                1 => {
                    for byte in hello {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        if stream.write_all(&[byte]).await.is_err() {
                            break;
                        }
                    }
                }
                _ => {}
            }
            until_closed(&mut stream).await?;
            anyhow::Ok(start.elapsed())
        }));
    }
    for client in slow {
        let took = client.await??;
        assert!(took < Duration::from_secs(20), "cut off after {took:?}");
    }
    unharmed(&tier, honest, before).await
}

fn put_sasl_first(out: &mut BytesMut, mechanism: &[u8], length: i32, first: &[u8]) {
    frame::put(out, tag::PASSWORD, |out| {
        frame::put_cstr(out, mechanism);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(first);
    });
}

/// Turns the right client-first message into the mechanism and message to send.
type First<'a> = &'a dyn Fn(&str) -> (Vec<u8>, Vec<u8>);

/// What one login attempt answers to a changed client-first and client-final message: the frames up to the end.
async fn attempt(tier: &Tier, first: First<'_>, last: &dyn Fn(&str) -> Vec<u8>) -> Result<Vec<u8>> {
    let mut stream = dial(tier).await?;
    let mut out = hello(tier);
    stream.write_all(&out.split()).await?;
    let (kind, _) = read_frame(&mut stream).await?;
    assert_eq!(kind, server::AUTHENTICATION);
    let mut scram = ScramSha256::new(tier.state.shop_password.as_bytes(), ChannelBinding::unsupported());
    let (mechanism, message) = first(std::str::from_utf8(scram.message())?);
    put_sasl_first(&mut out, &mechanism, message.len() as i32, &message);
    stream.write_all(&out.split()).await?;
    let (kind, body) = read_frame(&mut stream).await?;
    let mut kinds = vec![kind];
    if kind == server::AUTHENTICATION {
        scram.update(body.get(4..).context("challenge")?)?;
        let message = last(std::str::from_utf8(scram.message())?);
        frame::put(&mut out, tag::PASSWORD, |out| out.extend_from_slice(&message));
        stream.write_all(&out.split()).await?;
        while let Ok((kind, _)) = read_frame(&mut stream).await {
            kinds.push(kind);
            if kind == server::READY {
                return Ok(kinds);
            }
        }
    }
    until_closed(&mut stream).await?;
    Ok(kinds)
}

async fn read_frame(stream: &mut TcpStream) -> Result<(u8, Vec<u8>)> {
    let read = async {
        let kind = stream.read_u8().await?;
        let length = stream.read_u32().await?;
        let mut body = vec![0; (length as usize).checked_sub(4).context("length")?];
        stream.read_exact(&mut body).await?;
        anyhow::Ok((kind, body))
    };
    tokio::time::timeout(PATIENCE, read).await.context("no frame")?
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_scram_in_every_field() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"5s\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let plain = |message: &str| (b"SCRAM-SHA-256".to_vec(), message.as_bytes().to_vec());
    let same = |message: &str| message.as_bytes().to_vec();
    let right = attempt(&tier, &plain, &same).await?;
    assert_eq!(right.last(), Some(&server::READY), "the unchanged exchange logs in");

    type Change = fn(&str) -> Vec<u8>;
    let firsts: [(&str, Change); 9] = [
        ("empty", |_| Vec::new()),
        ("no nonce", |_| b"n,,n=".to_vec()),
        ("an empty nonce", |_| b"n,,n=,r=".to_vec()),
        ("an unknown flag", |message| message.replacen("n,,", "x,,", 1).into_bytes()),
        ("channel binding without TLS", |message| message.replacen("n,,", "p=tls-server-end-point,,", 1).into_bytes()),
        ("a reserved extension", |message| message.replacen("n,,", "n,,m=x,", 1).into_bytes()),
        ("not text", |_| b"n,,n=\xff\xfe,r=\xff".to_vec()),
        ("a nonce with a comma", |_| b"n,,n=,r=a,b=,".to_vec()),
        ("very long", |_| [&b"n,,n=,r="[..], &[b'a'; 12_000]].concat()),
    ];
    for (what, change) in firsts {
        let kinds = attempt(&tier, &|message| (b"SCRAM-SHA-256".to_vec(), change(message)), &same).await;
        // Some are well formed, so that only the proof shows them to be wrong; none may log in.
        assert!(kinds.is_err() || !kinds?.contains(&server::READY), "{what} logged in");
    }
    for mechanism in [&b"SCRAM-SHA-1"[..], b"SCRAM-SHA-256-PLUS", b"", b"PLAIN", &[b'x'; 5000]] {
        let kinds = attempt(&tier, &|message| (mechanism.to_vec(), message.as_bytes().to_vec()), &same).await?;
        assert_eq!(kinds, [server::ERROR], "{:?}", String::from_utf8_lossy(mechanism));
    }
    let lasts: [(&str, Change); 10] = [
        ("empty", |_| Vec::new()),
        ("another channel binding", |message| message.replacen("c=biws", "c=eSws", 1).into_bytes()),
        ("no channel binding", |message| message.replacen("c=biws,", "", 1).into_bytes()),
        ("another nonce", |message| message.replacen("r=", "r=x", 1).into_bytes()),
        ("a shorter nonce", |message| {
            let cut = message.find(",p=").unwrap_or(0);
            [&message[..cut - 1], &message[cut..]].concat().into_bytes()
        }),
        ("no proof", |message| message.split(",p=").next().unwrap_or_default().as_bytes().to_vec()),
        ("an empty proof", |message| [message.split(",p=").next().unwrap_or_default(), ",p="].concat().into_bytes()),
        ("a short proof", |message| message.as_bytes()[..message.len() - 8].to_vec()),
        ("another proof", |message| {
            let at = message.find(",p=").unwrap_or(0) + 3;
            let letter = if message.as_bytes()[at] == b'A' { "B" } else { "A" };
            [&message[..at], letter, &message[at + 1..]].concat().into_bytes()
        }),
        ("not base64", |message| {
            [message.split(",p=").next().unwrap_or_default(), ",p=\u{1F980}!"].concat().into_bytes()
        }),
    ];
    for (what, change) in lasts {
        let kinds = attempt(&tier, &plain, &change).await?;
        assert_eq!(kinds, [server::AUTHENTICATION, server::ERROR], "{what}");
    }
    // The proof of one exchange is worth nothing in the next.
    let seen = parking_lot::Mutex::new(Vec::new());
    attempt(&tier, &plain, &|message| {
        *seen.lock() = message.as_bytes().to_vec();
        message.as_bytes().to_vec()
    })
    .await?;
    let replayed = attempt(&tier, &plain, &|_| seen.lock().clone()).await?;
    assert_eq!(replayed, [server::AUTHENTICATION, server::ERROR], "a replayed proof");
    unharmed(&tier, honest, before).await
}

/// Messages that are well formed, at the wrong time.
#[tokio::test(flavor = "multi_thread")]
async fn messages_out_of_turn() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"3s\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    // Instead of a password, every message that is not one.
    for kind in *b"QPBDECSHXFdcf\0?" {
        let mut stream = dial(&tier).await?;
        stream.write_all(&hello(&tier)).await?;
        read_frame(&mut stream).await?;
        let mut out = BytesMut::new();
        frame::put(&mut out, kind, |out| out.extend_from_slice(b"SELECT 1\0"));
        stream.write_all(&out).await?;
        let said = until_closed(&mut stream).await?;
        assert!(!said.contains(&b'Z'), "{} was served before login", char::from(kind));
    }
    // A statement behind the startup packet, ahead of the login, is nobody's.
    let mut stream = dial(&tier).await?;
    let mut out = hello(&tier);
    put_query(&mut out, "INSERT INTO victims VALUES (666)");
    stream.write_all(&out).await?;
    until_closed(&mut stream).await?;
    assert_eq!(victims(&tier).await?, 0);
    // After login: what only servers send, a second startup packet, a cancel request inside a session.
    let mut cancel = BytesMut::new();
    startup::put_cancel(&mut cancel, 1, &[1, 2, 3, 4]);
    for bytes in
        [&b"R\0\0\0\x08\0\0\0\0"[..], b"Z\0\0\0\x05I", b"T\0\0\0\x06\0\0", b"p\0\0\0\x05\0", &hello(&tier), &cancel]
    {
        for begun in [false, true] {
            let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
            if begun {
                raw.query("BEGIN; INSERT INTO victims VALUES (1)").await?;
            }
            raw.out.extend_from_slice(bytes);
            raw.flush().await?;
            raw.half_close().await?;
            assert!(raw.closed().await, "{bytes:?}");
        }
    }
    // Copy messages outside a copy are ignored, as Postgres ignores them.
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    for kind in [tag::COPY_DATA, tag::COPY_DONE, tag::COPY_FAIL] {
        frame::put(&mut raw.out, kind, |out| out.extend_from_slice(b"9\n\0"));
    }
    assert_eq!(raw.query("SELECT count(*) FROM victims").await?, ("TDCZ".to_owned(), vec!["0".to_owned()]));
    unharmed(&tier, honest, before).await
}

/// Clients that leave while they wait for a Backend give their places back, and nothing of theirs runs later.
#[tokio::test(flavor = "multi_thread")]
async fn disconnects_in_the_queue() -> Result<()> {
    let tier = tier("[pool]\nsize = 2\nwait_max = \"20s\"").await?;
    let before = memory_kib(&tier)?;
    let mut holders = Vec::new();
    for _ in 0..2 {
        let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        raw.query("BEGIN").await?;
        raw.query("SELECT count(*) FROM victims").await?;
        holders.push(raw);
    }
    for _ in 0..50 {
        let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        put_query(&mut raw.out, "SELECT count(*) FROM victims");
        raw.flush().await?;
        drop(raw);
    }
    for mut holder in holders {
        holder.query("COMMIT").await?;
    }
    let honest = Honest::start(&tier).await?;
    unharmed(&tier, honest, before).await
}

/// Floods: any number of tiny messages in one go costs time, not memory; and all answers come.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_tiny_messages() -> Result<()> {
    const FLOOD: usize = 100_000;
    let tier = tier("").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    for pinned in [false, true] {
        let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        if pinned {
            raw.query("CREATE TEMP TABLE pinned (a int)").await?;
        }
        // Never read meanwhile: weir may stop taking more, but must not gather the answers.
        let (mut reader, mut writer) = raw.split();
        let flood = tokio::spawn(async move {
            let mut out = BytesMut::new();
            (0..FLOOD).for_each(|_| put_sync(&mut out));
            (0..FLOOD).for_each(|_| put_flush(&mut out));
            writer.write_all(&out).await?;
            anyhow::Ok(writer)
        });
        let mut answers = vec![0; FLOOD * 6];
        tokio::time::timeout(PATIENCE, reader.read_exact(&mut answers)).await.context("not all answers come")??;
        assert!(answers.chunks(6).all(|answer| answer == b"Z\0\0\0\x05I"), "every Sync is answered");
        drop(flood.await??);
    }
    // Statements without end and nobody who reads the answers.
    let mut deaf = Vec::new();
    for _ in 0..5 {
        let raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        let (reader, mut writer) = raw.split();
        let mut out = BytesMut::new();
        for _ in 0..20_000 {
            put_query(&mut out, "SELECT repeat('x', 1000)");
        }
        let _ = tokio::time::timeout(Duration::from_millis(500), writer.write_all(&out)).await;
        deaf.push((reader, writer));
    }
    let grown = memory_kib(&tier)?;
    assert!(grown < before + GROWTH_KIB_MAX, "memory grew from {before} to {grown} KiB");
    drop(deaf);
    unharmed(&tier, honest, before).await
}

/// A client that asks for a gigabyte and does not read it, and one that reads a row of 200 MB a little at a time.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_are_slow() -> Result<()> {
    let tier = tier("").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let mut deaf = Vec::new();
    for sql in [
        "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)",
        "COPY (SELECT repeat('y', 1000) FROM generate_series(1, 1000000)) TO STDOUT",
    ] {
        for _ in 0..4 {
            let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
            put_query(&mut raw.out, sql);
            raw.flush().await?;
            raw.peeked().await?;
            deaf.push(raw);
        }
    }
    let raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    let (mut reader, mut writer) = raw.split();
    let mut out = BytesMut::new();
    put_query(&mut out, "SELECT repeat('z', 200000000)");
    writer.write_all(&out).await?;
    let (mut read, mut peak, mut buffer) = (0, 0, vec![0; 1 << 20]);
    while read < 200_000_000 {
        let count = tokio::time::timeout(PATIENCE, reader.read(&mut buffer)).await.context("a row in pieces")??;
        assert!(count > 0, "closed after {read} bytes");
        if read % 64 == 0 || read >> 24 != (read + count) >> 24 {
            peak = peak.max(memory_kib(&tier)?);
        }
        read += count;
    }
    assert!(peak < before + GROWTH_KIB_MAX, "memory went from {before} to {peak} KiB");
    drop(deaf);
    unharmed(&tier, honest, before).await
}

/// Large messages up: held once, within the limit, and given back.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_are_given_back() -> Result<()> {
    let tier = tier("").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let client = tier.connect().await?;
    let text = "x".repeat(120_000_000);
    let row = client.query_one("SELECT length($1::text), left($1::text, 3)", &[&text]).await?;
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (120_000_000, "xxx"));
    drop(text);
    // In a copy, as one message and as many.
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    raw.query("CREATE TEMP TABLE wide (a text)").await?;
    put_query(&mut raw.out, "COPY wide FROM STDIN");
    assert_eq!(raw.next().await?.0, server::COPY_IN);
    frame::put(&mut raw.out, tag::COPY_DATA, |out| {
        out.resize(out.len() + 120_000_000, b'w');
        out.extend_from_slice(b"\n");
    });
    // A message of a copy flows through; only the sender holds all of it.
    let unloaded = memory_kib(&tier)?;
    raw.flush().await?;
    let loaded = memory_kib(&tier)?;
    assert!(loaded < unloaded + GROWTH_KIB_MAX / 2, "memory went from {unloaded} to {loaded} KiB");
    for _ in 0..100 {
        frame::put(&mut raw.out, tag::COPY_DATA, |out| out.resize(out.len() + 1_000_000, b'v'));
    }
    frame::put(&mut raw.out, tag::COPY_DONE, |_| {});
    let (tags, _) = raw.until_ready().await?;
    assert_eq!(tags, "CZ");
    assert_eq!(
        raw.query("SELECT string_agg(length(a)::text, ' ' ORDER BY a DESC) FROM wide").await?.1,
        ["120000000 100000000"]
    );
    drop(raw);
    unharmed(&tier, honest, before).await
}

/// The server refuses a copy while a large message of it is under way: the message goes its way, and the session goes on.
#[tokio::test(flavor = "multi_thread")]
async fn copies_that_fail_amid_a_large_message() -> Result<()> {
    let tier = tier("[pool]\nsize = 2").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    for extended in [false, true] {
        if extended {
            Parse { name: b"", sql: b"COPY victims FROM STDIN", types: b"" }.put(&mut raw.out);
            frame::put(&mut raw.out, tag::BIND, |out| out.extend_from_slice(&[0; 8]));
            Execute { portal: b"", rows_max: 0 }.put(&mut raw.out);
            put_flush(&mut raw.out);
            assert_eq!((raw.next().await?.0, raw.next().await?.0), (server::PARSE_COMPLETE, server::BIND_COMPLETE));
        } else {
            put_query(&mut raw.out, "COPY victims FROM STDIN");
        }
        assert_eq!(raw.next().await?.0, server::COPY_IN);
        frame::put(&mut raw.out, tag::COPY_DATA, |out| out.extend_from_slice(b"no number\n"));
        let mut large = BytesMut::new();
        frame::put(&mut large, tag::COPY_DATA, |out| out.resize(out.len() + 8_000_000, b'9'));
        raw.out.unsplit(large.split_to(1_000_000));
        let (kind, body) = raw.next().await?;
        assert_eq!((kind, &crate::raw::error_text(&body)[..5]), (server::ERROR, "22P02"));
        raw.out.unsplit(large);
        frame::put(&mut raw.out, tag::COPY_DONE, |_| {});
        if extended {
            put_sync(&mut raw.out);
        }
        assert_eq!(raw.until_ready().await?.0, "Z");
        assert_eq!(raw.query("SELECT count(*) FROM victims").await?.1, ["0"]);
    }
    unharmed(&tier, honest, before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_of_garbage() -> Result<()> {
    let tier = tier("[limits]\nlogin_time_max = \"5s\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let hello = hello(&tier).freeze();
    let mut state = 7_u64;
    let mut waves = Vec::new();
    for number in 0..1_000_usize {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (mut stream, hello, mut random) = (dial(&tier).await?, hello.clone(), state);
        waves.push(tokio::spawn(async move {
            let garbage: Vec<u8> = (0..200 + random as usize % 3_000)
                .map(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (random >> 56) as u8
                })
                .collect();
            // Half of them begin as a client would.
            let bytes = if number % 2 == 0 { garbage } else { [&hello[..], &garbage].concat() };
            let _ = stream.write_all(&bytes).await;
            if number % 3 == 0 {
                let _ = stream.shutdown().await;
            }
            let said = until_closed(&mut stream).await?;
            if said.contains(&b'Z') {
                bail!("garbage was let in: {said:?}");
            }
            anyhow::Ok(())
        }));
    }
    for client in waves {
        client.await??;
    }
    unharmed(&tier, honest, before).await
}

/// Garbage from clients that have logged in: mutations of an honest conversation.
#[tokio::test(flavor = "multi_thread")]
async fn mutated_conversations() -> Result<()> {
    let tier = tier("[pool]\nsize = 4\n[limits]\nmessage_bytes_max = \"1MiB\"").await?;
    let (honest, before) = (Honest::start(&tier).await?, memory_kib(&tier)?);
    let all: Vec<u8> = conversation().concat();
    let mut state = 11_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..400 {
        let mut bytes = all.clone();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(3) {
                0 => bytes[at] ^= 1 << random(8),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random(256) as u8),
            }
        }
        let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
        raw.out.extend_from_slice(&bytes);
        raw.flush().await?;
        raw.half_close().await?;
        assert!(raw.closed().await, "round {round}");
    }
    unharmed(&tier, honest, before).await
}
