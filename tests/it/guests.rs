//! Rows that a shard has and another one owns, while slots move: nobody sees, changes or locks them.
//!
//! The tests put such rows onto shards by hand, spoil them, and tell the hub of moves that nobody drives: they hold the mover's lock.
//! The judge is one Postgres that never had them. Reading order: the tests → [`Guests`].
//! Non-goal: moves that move (the mover has tests of its own).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::{SinkExt as _, TryStreamExt as _, pin_mut};
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::engine::{refusal, route};
use crate::placement::column;
use crate::rows::Pair;
use crate::{carried, differential};

/// Time for a proxy to hear of an epoch.
const HEAR: Duration = Duration::from_secs(30);
const NEXT_EPOCH: &str = "UPDATE weir.topology SET epoch = epoch + 1 WHERE database = 'shop'; NOTIFY weir_topology;";

/// A sharded table: its name, how Postgres hashes its key, and what is set in its guests, if anything.
type Table = (&'static str, &'static str, &'static str);

const SHOP: &[Table] = &[
    ("users", "hashint8extended(user_id, 0)", "name = 'guest', age = 999, score = 123456789, born = '1900-01-01'"),
    ("orders", "hashint8extended(user_id, 0)", "status = 'guest', total_cents = 99999999"),
    ("order_items", "hashint8extended(user_id, 0)", "qty = 99999"),
    ("inventory", "hashint8extended(product_id, 0)", "on_hand = 99999"),
    ("user_emails", "hashtextextended(email, 0)", ""),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_corpus_is_answered_as_if_there_were_none() -> Result<()> {
    differential::run_prepared(2, Tier::builder().shards(2), async |tier| Guests::put(tier, SHOP).await).await
}

/// Some keys have owners of their own, and stay behind when their slots move.
#[tokio::test(flavor = "multi_thread")]
async fn the_corpus_is_answered_as_if_there_were_none_where_keys_are_isolated() -> Result<()> {
    differential::run_prepared(2, Tier::builder().shards(2), async |tier| Guests::put_beside_isolated(tier, SHOP).await)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_corpus_is_answered_as_if_there_were_none_on_three_shards() -> Result<()> {
    let tier = Tier::builder().shards(3).replicas(1).redis(true);
    differential::run_prepared(3, tier, async |tier| Guests::put(tier, SHOP).await).await
}

/// Writes of rows that are read first: see `carried.rs`.
#[tokio::test(flavor = "multi_thread")]
async fn carried_rows_are_none_of_them() -> Result<()> {
    let pair = Pair::start(2, carried::TABLES, carried::SCHEMA).await?;
    let tables: Vec<Table> = carried::KEYS.iter().map(|(table, hash)| (*table, *hash, "")).collect();
    let guests = Guests::put(&pair.tier, &tables).await?;
    carried::inserts(&pair).await?;
    carried::prepared(&pair).await?;
    guests.leave().await?;
    carried::same_rows(&pair).await
}

const USERS: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, name text NOT NULL, cents bigint NOT NULL DEFAULT 0);
CREATE TABLE orders (user_id bigint, order_no int, status text, doubled int GENERATED ALWAYS AS (order_no * 2) STORED,
    PRIMARY KEY (user_id, order_no));
CREATE TABLE archive (user_id bigint, order_no int, why text);
CREATE TABLE products (product_id bigint PRIMARY KEY, name text);
INSERT INTO users SELECT n, 'u' || n % 7, n FROM generate_series(1, 60) n;
INSERT INTO orders (user_id, order_no, status) SELECT n % 60 + 1, n, 's' || n % 3 FROM generate_series(1, 200) n;
INSERT INTO products VALUES (1, 'one'), (2, 'two')";
const USERS_TABLES: &[&str] =
    &["users(user_id bigint)", "orders(user_id bigint)", "archive(user_id bigint)", "products"];
const USERS_KEYS: &[(&str, &str)] = &[
    ("users", "hashint8extended(user_id, 0)"),
    ("orders", "hashint8extended(user_id, 0)"),
    ("archive", "hashint8extended(user_id, 0)"),
];
const USERS_GUESTS: &[Table] = &[
    ("users", "hashint8extended(user_id, 0)", "cents = cents + 1000000"),
    ("orders", "hashint8extended(user_id, 0)", ""),
];

async fn users() -> Result<(Pair, Guests)> {
    let pair = Pair::start(2, USERS_TABLES, USERS).await?;
    let guests = Guests::put(&pair.tier, USERS_GUESTS).await?;
    Ok((pair, guests))
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_over_shards_leave_them_alone() -> Result<()> {
    let (pair, guests) = users().await?;
    for sql in [
        "UPDATE users SET cents = cents + 1",
        "UPDATE users SET cents = cents * 2 WHERE name = 'u1' OR name = 'u2'",
        "UPDATE users AS u SET name = name || '!' FROM orders o WHERE o.user_id = u.user_id AND o.status = 's1'",
        "UPDATE users SET cents = (SELECT count(*) FROM orders o WHERE o.user_id = users.user_id)",
        "UPDATE users SET cents = 5 WHERE user_id IN (1, 2, 3, 4, 5, 6, 7, 8)",
        "DELETE FROM orders WHERE status = 's2' OR order_no < 10",
        "DELETE FROM orders o USING users u WHERE u.user_id = o.user_id AND u.name LIKE 'u3%'",
        "INSERT INTO archive SELECT user_id, order_no, 'kept' FROM orders WHERE order_no > 20",
        "INSERT INTO users (user_id, name) SELECT user_id + 1000, 'moved' FROM orders WHERE order_no BETWEEN 30 AND 50 ON CONFLICT DO NOTHING",
        "UPDATE users SET user_id = user_id + 5000 WHERE cents < 3",
        "UPDATE products SET name = name || '!'",
        "MERGE INTO archive a USING orders o ON a.user_id = o.user_id AND a.order_no = o.order_no WHEN MATCHED AND o.order_no > 60 THEN DELETE \
         WHEN MATCHED THEN UPDATE SET why = 'again' WHEN NOT MATCHED THEN INSERT (user_id, order_no) VALUES (o.user_id, o.order_no)",
        "MERGE INTO users u USING (SELECT user_id, order_no AS n FROM orders WHERE order_no BETWEEN 30 AND 60) s ON s.user_id = u.user_id \
         WHEN MATCHED THEN UPDATE SET cents = s.n",
        "MERGE INTO users u USING products p ON p.product_id = u.cents % 3 WHEN MATCHED THEN UPDATE SET name = p.name",
        "BEGIN",
        "UPDATE users SET cents = 0",
        "DELETE FROM archive WHERE order_no % 2 = 0",
        "COMMIT",
    ] {
        pair.fine(sql).await?;
    }
    for sql in [
        "DELETE FROM orders WHERE order_no % 5 = 0 RETURNING user_id, order_no, doubled",
        "UPDATE users SET cents = 1 WHERE name LIKE 'u4%' RETURNING *",
        "WITH gone AS (DELETE FROM orders WHERE order_no % 7 = 0 RETURNING *) INSERT INTO archive SELECT user_id, order_no, 'gone' FROM gone \
         RETURNING *",
        "WITH gone AS (DELETE FROM archive a WHERE why = 'gone' RETURNING user_id) UPDATE users SET name = 'twice' FROM gone \
         WHERE gone.user_id = users.user_id RETURNING users.user_id",
    ] {
        pair.same_set(sql).await?;
    }
    let prepared = pair.sharded.prepare("UPDATE users SET cents = cents + $1 WHERE cents >= $2").await?;
    let changed = pair.sharded.execute(&prepared, &[&7_i64, &0_i64]).await?;
    assert_eq!(
        changed,
        pair.single.execute("UPDATE users SET cents = cents + $1 WHERE cents >= $2", &[&7_i64, &0_i64]).await?
    );
    guests.leave().await?;
    pair.same_rows_of(USERS_KEYS).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_have_to_touch_them_is_refused() -> Result<()> {
    let (pair, guests) = users().await?;
    for sql in ["TRUNCATE users", "TRUNCATE orders, archive"] {
        let (code, detail, hint) = refusal(&pair.sharded, sql).await?;
        ensure!(code == "55006" && !detail.is_empty() && hint.contains("SHOW MOVES"), "{code} {detail} {hint}");
    }
    guests.leave().await?;
    pair.same_rows_of(USERS_KEYS).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_otherwise_are_none_of_them() -> Result<()> {
    let (mut pair, guests) = users().await?;
    for copy in [
        "COPY users TO STDOUT",
        "COPY orders TO STDOUT WITH CSV HEADER",
        "COPY public.orders (status, order_no) TO STDOUT (FORMAT csv)",
        "COPY (SELECT name, cents FROM users WHERE cents > 3 OR name = 'u1') TO STDOUT",
        "COPY (SELECT name, sum(cents) FROM users GROUP BY name ORDER BY 1) TO STDOUT",
    ] {
        let (expected, got) = (lines(&pair.single, copy).await?, lines(&pair.sharded, copy).await?);
        ensure!(expected == got, "{copy}\nPostgres: {expected:?}\nweir: {got:?}");
    }
    // Portals that are fetched in parts, with parameters, and what merging hides.
    for sql in [
        "SELECT user_id FROM users WHERE cents > $1 ORDER BY name, cents",
        "SELECT sum(cents)::bigint FROM users WHERE cents > $1",
    ] {
        let mut told = Vec::new();
        for client in [&mut pair.single, &mut pair.sharded] {
            let transaction = client.transaction().await?;
            let portal = transaction.bind(sql, &[&4_i64]).await?;
            let mut keys: Vec<i64> = Vec::new();
            loop {
                let rows = transaction.query_portal(&portal, 7).await?;
                keys.extend(rows.iter().map(|row| row.get::<_, i64>(0)));
                if rows.len() < 7 {
                    break;
                }
            }
            transaction.commit().await?;
            told.push(keys);
        }
        ensure!(told[0] == told[1], "{sql}: {told:?}");
    }
    for sql in [
        "BEGIN",
        "DECLARE c CURSOR FOR SELECT user_id, name FROM users WHERE cents > 5 ORDER BY cents, user_id",
        "FETCH 9 FROM c",
        "FETCH ALL FROM c",
        "COMMIT",
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        "SELECT count(*), sum(cents), max(cents) FROM users",
        "SELECT name, count(*) FROM users JOIN orders USING (user_id) GROUP BY name ORDER BY name",
        "COMMIT",
        // On the engine.
        "SELECT user_id, rank() OVER (ORDER BY cents DESC, user_id) FROM users ORDER BY 2 LIMIT 5",
        "SELECT user_id FROM users EXCEPT SELECT user_id FROM orders ORDER BY 1",
        "SELECT n FROM users AS u (i, n, c) ORDER BY c LIMIT 4",
    ] {
        pair.fine(sql).await?;
    }
    let told = route(&pair.tier, "SELECT count(*) FROM users").await?;
    ensure!(told.contains("guests=left out: slots"), "{told}");
    let plans = column(&pair.sharded, "EXPLAIN (COSTS off) SELECT name FROM users").await?;
    ensure!(plans.iter().filter(|line| line.contains("get_bit(")).count() == 2, "{plans:#?}");
    ensure!(plans.iter().any(|line| line.contains("guests: left out")), "{plans:#?}");
    // One shard that owns all the keys is asked as ever.
    let plans = column(&pair.sharded, "EXPLAIN SELECT name FROM users WHERE user_id = 1").await?;
    ensure!(!plans.iter().any(|line| line.contains("get_bit(")), "{plans:#?}");
    guests.leave().await
}

/// What COPY gives, sorted.
async fn lines(client: &Client, copy: &str) -> Result<Vec<String>> {
    let stream = client.copy_out(copy).await.with_context(|| copy.to_owned())?;
    pin_mut!(stream);
    let mut all = Vec::new();
    while let Some(piece) = stream.try_next().await? {
        all.extend_from_slice(&piece);
    }
    let mut lines: Vec<String> = String::from_utf8(all)?.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// Guests of every shard but one that has none to show, as they were put there.
struct Guests {
    /// Holds the mover's lock.
    hub: Client,
    rooms: Vec<Room>,
    /// Hashes of keys that are on another shard than their slot says.
    isolated: Vec<i64>,
}

/// Guests of one table on one shard.
struct Room {
    host: Client,
    table: &'static str,
    /// Is a row a guest?
    condition: String,
    /// What the rows were.
    digest: Vec<String>,
}

impl Room {
    async fn digest(&self) -> Result<Vec<String>> {
        let Room { table, condition, .. } = self;
        let sql = format!("SELECT t::text FROM {table} t WHERE {condition} ORDER BY 1");
        column(&self.host, &sql).await
    }
}

impl Guests {
    async fn put(tier: &Tier, tables: &[Table]) -> Result<Guests> {
        Guests::put_beside(tier, tables, Vec::new()).await
    }

    /// First some users go to the other one of two shards. Not those whose place among the rows shows: which of 0 and -0 DISTINCT
    /// answers depends on which comes first, and the last digits of a sum of floats on their order.
    async fn put_beside_isolated(tier: &Tier, tables: &[Table]) -> Result<Guests> {
        let [first, second] = &tier.shards[..] else { anyhow::bail!("two shards") };
        let mut isolated = Vec::new();
        let mut servers = Vec::new();
        for shard in [first, second] {
            let client = shard.primary.admin("shop").await?;
            client.batch_execute("SET session_replication_role = replica").await?;
            let found = client
                .query("SELECT hashint8extended(user_id, 0) FROM users WHERE age >= 60 AND odd IS DISTINCT FROM 0", &[])
                .await?;
            servers.push((client, found.iter().map(|row| row.get(0)).collect::<Vec<i64>>()));
        }
        let hub = tier.hub.admin("weir_hub").await?;
        for (number, (from, hashes)) in servers.iter().enumerate() {
            let to = 1 - number;
            for (table, hash, _) in tables {
                let condition = format!("{hash} = ANY('{{{}}}')", listed(hashes));
                copy_rows(from, &servers[to].0, table, &condition).await?;
                from.batch_execute(&format!("DELETE FROM {table} WHERE {condition}")).await?;
            }
            let sql = "INSERT INTO weir.isolated_key (database, hash, key, shard) SELECT 'shop', hash, '?', $2 FROM unnest($1::int8[]) hash";
            hub.execute(sql, &[hashes, &(to as i16)]).await?;
            isolated.extend(hashes);
            ensure!(hashes.len() > 5, "only {} keys are isolated", hashes.len());
        }
        Guests::put_beside(tier, tables, isolated).await
    }

    async fn put_beside(tier: &Tier, tables: &[Table], isolated: Vec<i64>) -> Result<Guests> {
        let hub = tier.hub.admin("weir_hub").await?;
        let lock = i32::from_be_bytes(*b"wmov");
        hub.batch_execute(&format!("SELECT pg_advisory_lock({lock}, hashtext('shop'))")).await?;
        let mut guests = Guests { hub, rooms: Vec::new(), isolated };
        let last = tier.shards.len() - 1;
        // Copies on their way to the last shard; what the first one still has of slots that have gone there; on three shards, more.
        let mut moves = vec![(0, last, last, "copy", 2, 0), (0, last, 0, "reverse", 2, 1)];
        if last > 1 {
            moves.push((1, 0, 0, "catchup", 3, 0));
        }
        let mut change = Vec::new();
        for (source, target, host, phase, each, rest) in moves {
            let owner = if host == target { source } else { target };
            let slots = guests.slots(owner, (each, rest)).await?;
            guests.copy(tier, (owner, host), tables, &slots).await?;
            let stay = guests.isolated.iter().filter(|hash| {
                let slot = (**hash as u64 >> 52).to_string();
                slots.contains(&slot)
            });
            let stay: Vec<String> = stay.map(|hash| format!(",-{hash:016x}")).collect();
            let slots = format!("{}{}", slots.join(","), stay.concat());
            change.push(format!(
                "INSERT INTO weir.move (database, source, target, slots, phase, aim) \
                 VALUES ('shop', {source}, {target}, '{slots}', '{phase}', 'ready');"
            ));
        }
        change.push(NEXT_EPOCH.to_owned());
        guests.tell(&change.concat()).await?;
        Ok(guests)
    }

    /// Some of the slots that a shard owns.
    async fn slots(&self, owner: usize, (each, rest): (i32, i32)) -> Result<Vec<String>> {
        let sql = format!(
            "SELECT slot FROM weir.slot WHERE database = 'shop' AND shard = {owner} AND slot % {each} = {rest}"
        );
        let slots = column(&self.hub, &sql).await?;
        ensure!(slots.len() > 100, "shard {owner} owns {} such slots", slots.len());
        Ok(slots)
    }

    async fn copy(
        &mut self,
        tier: &Tier,
        (owner, host): (usize, usize),
        tables: &[Table],
        slots: &[String],
    ) -> Result<()> {
        let mut all = 0;
        for (table, hash, spoilt) in tables {
            let from = tier.shards[owner].primary.admin("shop").await?;
            let host = tier.shards[host].primary.admin("shop").await?;
            host.batch_execute("SET session_replication_role = replica").await?;
            let condition = format!(
                "((({hash} >> 52) & 4095) = ANY('{{{}}}') AND {hash} <> ALL('{{{}}}'))",
                slots.join(","),
                listed(&self.isolated)
            );
            copy_rows(&from, &host, table, &condition).await?;
            if !spoilt.is_empty() {
                host.batch_execute(&format!("UPDATE {table} SET {spoilt} WHERE {condition}")).await?;
            }
            let mut room = Room { host, table, condition, digest: Vec::new() };
            room.digest = room.digest().await?;
            all += room.digest.len();
            self.rooms.push(room);
        }
        ensure!(all > 3, "only {all} guests");
        Ok(())
    }

    /// Changes the map, and waits until weir works by it.
    async fn tell(&self, change: &str) -> Result<()> {
        self.hub.batch_execute(&format!("BEGIN; {change} COMMIT")).await?;
        let epoch = column(&self.hub, "SELECT epoch FROM weir.topology WHERE database = 'shop'").await?;
        let behind = format!("SELECT id FROM weir.proxy WHERE database = 'shop' AND epoch < {}", epoch[0]);
        let started = Instant::now();
        while !column(&self.hub, &behind).await?.is_empty() {
            ensure!(started.elapsed() < HEAR, "weir has not heard of epoch {}", epoch[0]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// They are as they were put there, and go; nothing moves any more.
    async fn leave(self) -> Result<()> {
        for room in &self.rooms {
            let Room { host, table, condition, .. } = room;
            let now = room.digest().await?;
            ensure!(now == room.digest, "guests of {table}: {now:?}, not {:?}", room.digest);
            host.batch_execute(&format!("DELETE FROM {table} WHERE {condition}")).await?;
        }
        let over = "UPDATE weir.move SET phase = 'cancelled' WHERE database = 'shop'";
        self.tell(&format!("{over}; {NEXT_EPOCH}")).await
    }
}

fn listed(hashes: &[i64]) -> String {
    hashes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

async fn copy_rows(from: &Client, to: &Client, table: &str, condition: &str) -> Result<()> {
    let columns = column(
        from,
        &format!(
            "SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 \
             AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
        ),
    )
    .await?
    .join(", ");
    let rows = from.copy_out(&format!("COPY (SELECT {columns} FROM {table} WHERE {condition}) TO STDOUT")).await?;
    let sink = to.copy_in(&format!("COPY {table} ({columns}) FROM STDIN")).await?;
    pin_mut!(rows, sink);
    while let Some(piece) = rows.try_next().await? {
        sink.send(piece).await?;
    }
    sink.finish().await?;
    Ok(())
}
