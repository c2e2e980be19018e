//! COPY of sharded tables, in and out: the same messages to one plain Postgres and to weir over three shards, and the same
//! answers, errors and rows.
//!
//! Reading order: the tests → [`Both`] (one copy on both) → [`Told`] (what is compared of an answer).

use anyhow::{Context as _, Result, ensure};
use futures_util::TryStreamExt as _;
use weir_harness::{Plain, Tier};
use weir_wire::backend::{report_field, tag};
use weir_wire::frame;
use weir_wire::frontend::{self, Bind, Execute, Parse, put_copy_fail, put_query, put_sync};

use crate::placement::column;
use crate::raw::Raw;

const SCHEMA: [&str; 3] = [
    "CREATE TABLE users (user_id bigint PRIMARY KEY, email text UNIQUE, name text NOT NULL CHECK (name <> 'bad'), \
     twice bigint GENERATED ALWAYS AS (user_id * 2) STORED)",
    "CREATE TABLE user_emails (email text PRIMARY KEY, user_id bigint NOT NULL)",
    "CREATE TABLE orders (user_id bigint REFERENCES users, order_id uuid, note text, PRIMARY KEY (user_id, order_id))",
];

/// What is compared of an answer: tags, command, and every field of an error that names no place in the source.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    tags: String,
    command: String,
    error: Vec<(char, String)>,
}

/// How the data of a copy ends.
#[derive(Clone, Copy)]
enum End {
    Done,
    Fail,
}

struct Both {
    _plain: Plain,
    tier: Tier,
    single: Raw,
    sharded: Raw,
}

impl Both {
    async fn start() -> Result<Both> {
        let (tier, plain) = (Tier::builder().shards(3).start().await?, Plain::start().await?);
        let (through, direct) = (tier.connect().await?, weir_harness::connect(&plain.dsn()).await?);
        for sql in SCHEMA {
            through.batch_execute(sql).await?;
            direct.batch_execute(sql).await?;
        }
        let sharded = Raw::login(&tier.dsn("shop"), &[]).await?;
        let single = Raw::login(&plain.dsn(), &[]).await?;
        Ok(Both { _plain: plain, tier, single, sharded })
    }

    /// Copies `data` in, cut into messages of `step` bytes, and compares.
    async fn load(&mut self, sql: &str, data: &[u8], step: usize, end: End) -> Result<Told> {
        let expected = load(&mut self.single, sql, data, step, end).await.context("plain")?;
        let told = load(&mut self.sharded, sql, data, step, end).await.context("weir")?;
        ensure!(told == expected, "{sql}\n{:?}\nplain: {expected:?}\nweir:  {told:?}", String::from_utf8_lossy(data));
        Ok(told)
    }

    /// Runs a query on both and compares the rows.
    async fn same(&mut self, sql: &str) -> Result<Vec<String>> {
        let (_, expected) = self.single.query(sql).await?;
        let (_, rows) = self.sharded.query(sql).await?;
        ensure!(rows == expected, "{sql}\nplain: {expected:?}\nweir:  {rows:?}");
        Ok(rows)
    }

    async fn clear(&mut self) -> Result<()> {
        for sql in ["DELETE FROM orders", "DELETE FROM users", "DELETE FROM user_emails"] {
            self.single.query(sql).await?;
            self.sharded.query(sql).await?;
        }
        Ok(())
    }
}

async fn load(raw: &mut Raw, sql: &str, data: &[u8], step: usize, end: End) -> Result<Told> {
    put_query(&mut raw.out, sql);
    let (mut kind, mut body) = raw.next().await?;
    let mut tags = String::new();
    if kind == tag::COPY_IN {
        tags.push('G');
        for piece in data.chunks(step) {
            frame::put(&mut raw.out, frontend::tag::COPY_DATA, |out| out.extend_from_slice(piece));
        }
        put_end(raw, end);
        (kind, body) = raw.next().await?;
    }
    let mut told = Told { tags, command: String::new(), error: Vec::new() };
    loop {
        told.tags.push(char::from(kind));
        note(&mut told, kind, &body);
        if kind == tag::READY {
            return Ok(told);
        }
        (kind, body) = raw.next().await?;
    }
}

fn put_end(raw: &mut Raw, end: End) {
    match end {
        End::Done => frame::put(&mut raw.out, frontend::tag::COPY_DONE, |_| {}),
        End::Fail => put_copy_fail(&mut raw.out, "changed my mind"),
    }
}

fn note(told: &mut Told, kind: u8, body: &[u8]) {
    match kind {
        tag::COMMAND_COMPLETE => told.command = String::from_utf8_lossy(body).into_owned(),
        tag::READY => told.command.push_str(&String::from_utf8_lossy(body)),
        tag::ERROR => {
            told.error = "CMDHWstcn"
                .chars()
                .filter_map(|code| Some((code, String::from_utf8_lossy(report_field(body, code as u8)?).into_owned())))
                .collect();
        }
        _ => {}
    }
}

/// Everything COPY … TO STDOUT sends, as one stream, and the command tag.
async fn dump(raw: &mut Raw, sql: &str) -> Result<(Vec<u8>, String)> {
    put_query(&mut raw.out, sql);
    let (tags, bodies) = raw.until_ready().await?;
    let (mut data, mut command) = (Vec::new(), String::new());
    for (kind, body) in tags.bytes().zip(&bodies) {
        match kind {
            tag::COPY_DATA => data.extend_from_slice(body),
            tag::COMMAND_COMPLETE => command = String::from_utf8_lossy(body).into_owned(),
            tag::ERROR => anyhow::bail!("{sql}: {}", crate::raw::error_text(body)),
            _ => {}
        }
    }
    ensure!(tags.starts_with('H') && tags.ends_with("cCZ"), "{tags}");
    Ok((data, command))
}

fn text_rows(keys: std::ops::Range<i64>) -> Vec<u8> {
    keys.flat_map(|key| format!("{key}\tu{key}@x\tname\\t{key}\n").into_bytes()).collect()
}

/// Every row lies on the shard of its slot, and on no other.
async fn assert_placed(tier: &Tier, table: &str, slot: &str) -> Result<Vec<i64>> {
    let (mut seen, mut counts) = (std::collections::BTreeSet::new(), Vec::new());
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let slots = column(&direct, &format!("SELECT DISTINCT ({slot} >> 52) & 4095 FROM {table}")).await?;
        for slot in slots {
            ensure!(seen.insert(slot.clone()), "slot {slot} is on two shards");
        }
        counts.push(column(&direct, &format!("SELECT count(*) FROM {table}")).await?[0].parse()?);
        ensure!(column(&direct, "SELECT count(*) FROM pg_prepared_xacts").await? == ["0"]);
    }
    Ok(counts)
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_go_to_the_shard_of_their_key_in_every_format() -> Result<()> {
    let mut both = Both::start().await?;
    both.load("COPY users FROM STDIN", &text_rows(1..1000), 37, End::Done).await?;
    let counts = assert_placed(&both.tier, "users", "hashint8extended(user_id, 0)").await?;
    assert!(counts.iter().all(|count| *count > 200) && counts.iter().sum::<i64>() == 999, "{counts:?}");
    both.same("SELECT user_id || email || name || twice FROM users ORDER BY user_id").await?;
    both.clear().await?;
    let csv = "email;name;user_id\r\n\"a;\"\"1\"\"\";\"line\r\nend\";1\r\n;x;2\r\n\"\";y;\"3\"\r\n";
    let sql = "COPY users (email, name, user_id) FROM STDIN WITH (FORMAT csv, HEADER match, DELIMITER ';', FORCE_NOT_NULL (name))";
    for step in [1, 5, 1000] {
        both.load(sql, csv.as_bytes(), step, End::Done).await?;
        let rows = both
            .same("SELECT user_id || ':' || coalesce(email, 'null') || ':' || name FROM users ORDER BY user_id")
            .await?;
        assert_eq!(rows, ["1:a;\"1\":line\r\nend", "2:null:x", "3::y"]);
        both.clear().await?;
    }
    // A text key, filtered, and what follows the end marker is nobody's.
    let emails = "a\\\\b\t1\nlong enough to be more than one block of the hash\t2\n\\x41\t3\nleft out\t99\n\\.\n???\n";
    both.load("COPY user_emails FROM STDIN WHERE user_id < 99", emails.as_bytes(), 3, End::Done).await?;
    assert_placed(&both.tier, "user_emails", "hashtextextended(email, 0)").await?;
    both.same("SELECT email || user_id FROM user_emails ORDER BY user_id").await?;
    // Binary, made by Postgres itself.
    both.load("COPY users FROM STDIN", &text_rows(1..300), 4096, End::Done).await?;
    for sql in ["COPY users TO STDOUT (FORMAT binary)", "COPY BINARY users (name, user_id) TO STDOUT"] {
        let (data, _) = dump(&mut both.single, sql).await?;
        both.clear().await?;
        let load = sql.replace("TO STDOUT", "FROM STDIN");
        for (step, data) in [(7, &data[..]), (100_000, &data[..data.len() - 2])] {
            both.load(&load, data, step, End::Done).await?;
            both.same("SELECT user_id || coalesce(email, '') || name FROM users ORDER BY user_id").await?;
            assert_placed(&both.tier, "users", "hashint8extended(user_id, 0)").await?;
            both.clear().await?;
        }
        both.load("COPY users FROM STDIN", &text_rows(1..300), 4096, End::Done).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_those_of_one_postgres_and_leave_nothing() -> Result<()> {
    let mut both = Both::start().await?;
    both.load("COPY users FROM STDIN", b"500\tfirst@x\tfirst\n", 100, End::Done).await?;
    let good = String::from_utf8(text_rows(1..200))?;
    let later = String::from_utf8(text_rows(300..400))?;
    let cases = [
        "x\tm\tn\n",
        "12\tm\n",
        "12\tm\tn\to\n",
        "500\tm\tn\n",
        "501\tfirst@x\tn\n",
        "12\tm\t\\N\n",
        "502\tm\tbad\n",
        "99999999999999999999\tm\tn\n",
        "\\N\tm\tn\n",
        "503\tm\\.\tn\n",
        "504\tm\tn\r\n",
        "\n",
        "505\t\\\n\tn\tm\n",
    ];
    for (which, bad) in cases.iter().enumerate() {
        let data = format!("{good}{bad}{later}");
        let step = [3, 50, 100_000][which % 3];
        let told = both.load("COPY users FROM STDIN", data.as_bytes(), step, End::Done).await;
        let told = told.with_context(|| format!("{bad:?}"))?;
        assert_eq!(told.tags, "GEZ", "{bad:?}");
        assert_eq!(both.same("SELECT count(*) FROM users").await?, ["1"], "{bad:?}");
    }
    let csv = ["1,a,\"b\n", "1,a,b\n2,\"c\nd\",e\nx,f,g\n", "1,a,b\n,c,d\n"];
    for bad in csv {
        both.load("COPY users FROM STDIN CSV", bad.as_bytes(), 4, End::Done)
            .await
            .with_context(|| format!("{bad:?}"))?;
    }
    // Which shard has seen a line end before is a matter of chance: SQLSTATE and message are the same, what is around them not.
    for bad in ["1,a,b\rc\n", "1,a,b\n2,c,d\r\n"] {
        let [expected, told] = [&mut both.single, &mut both.sharded];
        let expected = load(expected, "COPY users FROM STDIN CSV", bad.as_bytes(), 4, End::Done).await?;
        let told = load(told, "COPY users FROM STDIN CSV", bad.as_bytes(), 4, End::Done).await?;
        assert_eq!(told.error[..2], expected.error[..2], "{bad:?}");
    }
    both.load("COPY users FROM STDIN (HEADER match)", b"user_id\temail\tnames\n1\ta\tb\n", 9, End::Done).await?;
    both.load("COPY users FROM STDIN BINARY", b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x03\0\0\0\x08", 5, End::Done)
        .await?;
    both.load("COPY users FROM STDIN (DELIMITER 'ab')", b"", 9, End::Done)
        .await
        .expect_err("weir refuses it by itself");
    both.load("COPY orders FROM STDIN", b"7\t00000000-0000-0000-0000-000000000001\tno user\n", 9, End::Done).await?;
    // The client gives up, with and without rows; nothing sent at all.
    both.load("COPY users FROM STDIN", good.as_bytes(), 77, End::Fail).await?;
    both.load("COPY users FROM STDIN", b"", 77, End::Fail).await?;
    both.load("COPY users FROM STDIN", b"", 77, End::Done).await?;
    assert_eq!(both.same("SELECT count(*) FROM users").await?, ["1"]);
    assert_placed(&both.tier, "users", "hashint8extended(user_id, 0)").await?;
    Ok(())
}

/// Rows that one Postgres would take and weir cannot place are refused by weir itself, with its reason.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_placed_is_refused() -> Result<()> {
    let mut both = Both::start().await?;
    let refused = [
        ("COPY user_emails FROM STDIN (FORMAT csv)", &b"a,1\n\\.\n"[..], "22P04"),
        ("COPY users (email, name) FROM STDIN", b"", "0A000"),
        ("COPY users FROM STDIN (NOVEL)", b"", "0A000"),
        ("COPY users FROM STDIN (ENCODING 'latin1')", b"", "0A000"),
        ("COPY users FROM '/nowhere'", b"", "0A000"),
        ("COPY users TO PROGRAM 'cat'", b"", "0A000"),
    ];
    for (sql, data, sqlstate) in refused {
        let told = load(&mut both.sharded, sql, data, 100, End::Done).await?;
        assert_eq!(told.error[0], ('C', sqlstate.to_owned()), "{sql}");
        assert!(told.error.iter().any(|(code, _)| *code == 'D'), "{sql}: {told:?}");
    }
    both.sharded.query("SET client_encoding TO latin1").await?;
    let told = load(&mut both.sharded, "COPY users FROM STDIN", b"", 100, End::Done).await?;
    assert_eq!(told.error[0].1, "0A000");
    both.sharded.query("RESET client_encoding").await?;
    assert_eq!(both.sharded.query("SELECT count(*) FROM users").await?.1, ["0"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_belongs_to_its_transaction() -> Result<()> {
    let mut both = Both::start().await?;
    for (end, expected) in [("ROLLBACK", "0"), ("COMMIT", "99")] {
        both.same("BEGIN").await?;
        both.load("COPY users FROM STDIN", &text_rows(1..100), 512, End::Done).await?;
        both.load("COPY orders FROM STDIN", b"7\t00000000-0000-0000-0000-000000000001\t\\N\n", 512, End::Done).await?;
        assert_eq!(both.same("SELECT count(*) FROM users").await?, ["99"]);
        both.same(end).await?;
        assert_eq!(both.same("SELECT count(*) FROM users").await?, [expected]);
    }
    // A failed copy aborts the client's transaction, as any error does.
    both.same("BEGIN").await?;
    both.load("COPY users FROM STDIN", b"x\ty\tz\n", 512, End::Done).await?;
    assert!(both.same("SELECT 1").await?[0].starts_with("25P02"));
    both.same("ROLLBACK").await?;
    // By the extended protocol, and a shard that fails amid it; what follows is answered in step.
    for (data, expected) in [(text_rows(200..300), "CZ"), (b"201\tdouble\tname\n".to_vec(), "EZ")] {
        for raw in [&mut both.single, &mut both.sharded] {
            Parse { name: b"", sql: b"COPY users FROM STDIN", types: b"" }.put(&mut raw.out);
            Bind::read(b"\0\0\0\0\0\0\0\0")?.put_for(b"", &mut raw.out);
            Execute { portal: b"", rows_max: 0 }.put(&mut raw.out);
            put_sync(&mut raw.out);
            while raw.next().await?.0 != tag::COPY_IN {}
            frame::put(&mut raw.out, frontend::tag::COPY_DATA, |out| out.extend_from_slice(&data));
            put_end(raw, End::Done);
            put_sync(&mut raw.out);
            assert_eq!(raw.until_ready().await?.0, expected);
        }
        assert_eq!(both.same("SELECT count(*) FROM users").await?, ["199"]);
    }
    // The client leaves amid a copy: nothing stays, and nothing is locked.
    let mut leaving = Raw::login(&both.tier.dsn("shop"), &[]).await?;
    put_query(&mut leaving.out, "COPY users FROM STDIN");
    while leaving.next().await?.0 != tag::COPY_IN {}
    frame::put(&mut leaving.out, frontend::tag::COPY_DATA, |out| out.extend_from_slice(&text_rows(1000..2000)));
    leaving.flush().await?;
    drop(leaving);
    both.load("COPY users FROM STDIN", &text_rows(1000..1100), 512, End::Done).await?;
    assert_eq!(both.same("SELECT count(*) FROM users").await?, ["299"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_amid_a_copy_leaves_nothing_behind() -> Result<()> {
    let mut both = Both::start().await?;
    put_query(&mut both.sharded.out, "COPY users FROM STDIN");
    while both.sharded.next().await?.0 != tag::COPY_IN {}
    let data = text_rows(1..5000);
    frame::put(&mut both.sharded.out, frontend::tag::COPY_DATA, |out| out.extend_from_slice(&data));
    both.sharded.flush().await?;
    let direct = both.tier.shards[1].primary.admin("shop").await?;
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'COPY users%' AND pid <> pg_backend_pid()";
    while column(&direct, kill).await? != ["1"] {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    put_end(&mut both.sharded, End::Done);
    let mut error = None;
    while let Ok((kind, body)) = both.sharded.next().await {
        if kind == tag::ERROR {
            error = Some(crate::raw::error_text(&body));
        }
        if kind == tag::READY {
            break;
        }
    }
    assert!(error.is_some(), "the client is told");
    let client = both.tier.connect().await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, ["0"]);
    assert_placed(&both.tier, "users", "hashint8extended(user_id, 0)").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_out_as_from_one_postgres() -> Result<()> {
    let mut both = Both::start().await?;
    for rows in [0..0, 1..500] {
        both.load("COPY users FROM STDIN", &text_rows(rows), 4096, End::Done).await?;
        for sql in [
            "COPY users TO STDOUT",
            "COPY users (name, user_id) TO STDOUT (FORMAT csv, HEADER, FORCE_QUOTE *)",
            "COPY public.users TO STDOUT WITH CSV",
            "COPY (SELECT name, user_id FROM users WHERE user_id > 100) TO STDOUT (HEADER true)",
            "COPY (SELECT * FROM users) TO STDOUT",
            "COPY (SELECT user_id, email FROM users WHERE user_id IN (1, 2, 3, 4, 5)) TO STDOUT (FORMAT csv)",
        ] {
            let lines = |data: Vec<u8>| {
                let mut lines: Vec<Vec<u8>> = data.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
                let header = usize::from(sql.contains("HEADER"));
                lines[header..].sort();
                lines
            };
            let (expected, command) = dump(&mut both.single, sql).await?;
            let (data, other) = dump(&mut both.sharded, sql).await?;
            assert_eq!((lines(data), other), (lines(expected), command), "{sql}");
        }
        // A binary stream is one only if it can be loaded.
        let (data, _) = dump(&mut both.sharded, "COPY users TO STDOUT (FORMAT binary)").await?;
        both.single.query("CREATE TEMP TABLE again (LIKE users)").await?;
        both.single.query("ALTER TABLE again DROP COLUMN twice").await?;
        load(&mut both.single, "COPY again FROM STDIN BINARY", &data, 1000, End::Done).await?;
        let left = "SELECT count(*) FROM (TABLE again EXCEPT ALL SELECT user_id, email, name FROM users) AS x";
        assert_eq!(both.single.query(left).await?.1, ["0"]);
        let again = both.single.query("SELECT count(*) FROM again").await?.1;
        assert_eq!(again, both.single.query("SELECT count(*) FROM users").await?.1);
        both.single.query("DROP TABLE again").await?;
    }
    Ok(())
}

/// What a merge or the fallback engine would answer as a query.
#[tokio::test(flavor = "multi_thread")]
async fn queries_over_shards_come_out_as_from_one_postgres() -> Result<()> {
    let mut both = Both::start().await?;
    both.load("COPY users FROM STDIN", &text_rows(1..300), 4096, End::Done).await?;
    both.load("COPY user_emails FROM STDIN", b"a@x\t3\nb@x\t7\n", 4096, End::Done).await?;
    for query in [
        "SELECT name, twice FROM users ORDER BY user_id",
        "SELECT count(*), max(email) FROM users",
        "SELECT name FROM users ORDER BY email LIMIT 3",
        "SELECT DISTINCT user_id % 7, null, 'a,\"b' FROM users ORDER BY 1",
        "SELECT user_id, rank() OVER (ORDER BY name DESC) FROM users ORDER BY 1",
        "WITH x AS (SELECT user_id FROM users WHERE user_id < 9) SELECT a.user_id, b.email FROM x a JOIN user_emails b USING (user_id) ORDER BY 1",
        // Decided by the primary key, which the hub's tables do not have.
        "SELECT u.user_id, u.name, count(*) FROM users u JOIN user_emails e ON e.user_id > u.user_id GROUP BY u.user_id ORDER BY 1",
        "SELECT name FROM users WHERE user_id < 0 ORDER BY user_id",
        "TABLE users ORDER BY user_id",
        // More than is held back at a time.
        "SELECT repeat(a.name, 20), b.user_id FROM users a JOIN users b ON a.user_id <> b.user_id AND b.user_id < 20 ORDER BY a.user_id, b.user_id",
    ] {
        for options in
            ["", " WITH CSV HEADER", " (FORMAT csv, DELIMITER ';', FORCE_QUOTE *, NULL 'none')", " (FORMAT binary)"]
        {
            let sql = format!("COPY ({query}) TO STDOUT{options}");
            let expected = dump(&mut both.single, &sql).await?;
            let told = dump(&mut both.sharded, &sql).await?;
            ensure!(told == expected, "{sql}: {:?}", String::from_utf8_lossy(&told.0));
        }
    }
    for sql in [
        "COPY (SELECT name, count(*) FROM users ORDER BY 1) TO STDOUT",
        "COPY (SELECT u.name, e.email, count(*) FROM users u JOIN user_emails e ON e.user_id > u.user_id GROUP BY u.user_id) TO STDOUT",
        "COPY (SELECT novel FROM users ORDER BY 1) TO STDOUT",
        "COPY (SELECT name FROM users ORDER BY 1) TO STDOUT (NOVEL)",
        "COPY (SELECT DISTINCT novel FROM users) TO STDOUT",
        "COPY (SELECT 1 / (user_id - user_id) FROM users ORDER BY name) TO STDOUT",
    ] {
        let (expected, told) = (refused(&mut both.single, sql).await?, refused(&mut both.sharded, sql).await?);
        assert_eq!(told, expected, "{sql}");
    }
    // Which of two equal intervals is shown is chance.
    let sql = "COPY (SELECT DISTINCT make_interval(days => (user_id % 2)::int) FROM users) TO STDOUT";
    let answer = dump(&mut both.sharded, sql).await.expect_err(sql).to_string();
    assert!(answer.contains("0A000"), "{answer}");
    // In the extended protocol, inside a transaction, and again on the same connection.
    let client = both.tier.connect().await?;
    let statement =
        client.prepare("COPY (SELECT user_id, name FROM users ORDER BY user_id DESC LIMIT 3) TO STDOUT").await?;
    for begin in ["BEGIN", "COMMIT", "BEGIN READ ONLY"] {
        client.batch_execute(begin).await?;
        let rows: Vec<bytes::Bytes> = client.copy_out(&statement).await?.try_collect().await?;
        assert_eq!(rows.concat(), b"299\tname\\t299\n298\tname\\t298\n297\tname\\t297\n");
    }
    client.batch_execute("COMMIT").await?;
    client.batch_execute("BEGIN; UPDATE users SET name = 'new' WHERE user_id = 5").await?;
    let error = client.batch_execute("COPY (SELECT count(*) FROM users) TO STDOUT").await.err().context("refused")?;
    assert_eq!(error.code().map(|code| code.code().to_owned()), Some("0A000".to_owned()), "{error:?}");
    Ok(())
}

/// SQLSTATE, message and position of the error that a statement ends in.
async fn refused(raw: &mut Raw, sql: &str) -> Result<[String; 3]> {
    put_query(&mut raw.out, sql);
    let (tags, bodies) = raw.until_ready().await?;
    let at = tags.bytes().position(|kind| kind == tag::ERROR).with_context(|| format!("{sql}: {tags}"))?;
    Ok([b'C', b'M', b'P']
        .map(|code| String::from_utf8_lossy(report_field(&bodies[at], code).unwrap_or_default()).into_owned()))
}
