//! One shard gets a second one while clients go on: nobody is restarted, and no statement fails that several shards can run.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use weir_harness::{Cluster, Proxy, Tier, connect};

use super::{all_reach, nothing_is_left_on, order, rows};
use crate::placement::column;
use crate::reshard::empty_server;
use crate::unique::are_in_step;

const TABLES: &[&str] = &["users(user_id bigint) unique email", "notes(user_id bigint)", "products"];
const SCHEMA: &str = "
CREATE TABLE users (user_id bigserial PRIMARY KEY, email text UNIQUE, visits bigint NOT NULL DEFAULT 0);
CREATE TABLE notes (user_id bigint, note_id bigint GENERATED ALWAYS AS IDENTITY, note text, PRIMARY KEY (user_id, note_id));
CREATE TABLE products (product_id serial PRIMARY KEY, name text UNIQUE, stock bigint NOT NULL DEFAULT 0);
INSERT INTO products (name) VALUES ('tea'), ('cup')";
const CLIENTS: usize = 6;

/// Two proxies before one server that has all there is.
async fn alone() -> Result<(Tier, Proxy, Cluster, Client)> {
    let tier = Tier::builder().shards(1).tables(TABLES).peers(true).start().await?;
    tier.connect().await?.batch_execute(SCHEMA).await?;
    let second = tier.another().await?;
    let added = empty_server(&tier).await?;
    let console = connect(&tier.admin_dsn()).await?;
    Ok((tier, second, added, console))
}

fn add(added: &Cluster) -> String {
    format!("RESHARD START ADD SHARD shard1 '{}'", added.address())
}

/// What one client knows to be there.
#[derive(Default)]
struct Known {
    users: Vec<(i64, String)>,
    notes: Vec<(i64, i64)>,
    stocked: i64,
    slowest: Duration,
}

/// Signs up, writes and looks, until it is told to stop. Errors: a statement failed, or an answer was wrong.
async fn shopper(dsn: String, number: usize, stop: Arc<AtomicBool>) -> Result<Known> {
    let mut client = connect(&dsn).await?;
    let mut known = Known::default();
    for turn in 0.. {
        if stop.load(SeqCst) {
            break;
        }
        let begun = Instant::now();
        let email = format!("c{number}-{turn}");
        let signed_up = client.query_one("INSERT INTO users (email) VALUES ($1) RETURNING user_id", &[&email]).await;
        let user: i64 = signed_up.context("signing up")?.get(0);
        known.users.push((user, email.clone()));
        let visit = "UPDATE users SET visits = visits + 1 WHERE user_id = $1 RETURNING visits";
        let visits: i64 = client.query_one(visit, &[&user]).await.context("a visit")?.get(0);
        ensure!(visits == 1, "{visits} visits");
        let found: i64 = client.query_one("SELECT user_id FROM users WHERE email = $1", &[&email]).await?.get(0);
        ensure!(found == user, "{email} is {found} and not {user}");
        let taken = client.execute("INSERT INTO users (email) VALUES ($1)", &[&email]).await.expect_err("it is taken");
        ensure!(taken.code().map(tokio_postgres::error::SqlState::code) == Some("23505"), "{taken:?}");
        let transaction = client.transaction().await?;
        let note = "INSERT INTO notes (user_id, note) VALUES ($1, 'hello') RETURNING note_id";
        let note: i64 = transaction.query_one(note, &[&user]).await.context("a note")?.get(0);
        transaction
            .execute("UPDATE users SET visits = visits + 1 WHERE user_id = $1", &[&user])
            .await
            .context("2nd")?;
        transaction.commit().await.context("commit")?;
        known.notes.push((user, note));
        if number == 0 {
            client.simple_query("UPDATE products SET stock = stock + 1 WHERE name = 'tea'").await.context("stock")?;
            known.stocked += 1;
        }
        let mine = client.query_one("SELECT count(*) FROM users WHERE email LIKE $1", &[&format!("c{number}-%")]).await;
        let mine: i64 = mine.context("counting")?.get(0);
        ensure!(mine as usize == known.users.len(), "{mine} of {} users", known.users.len());
        known.slowest = known.slowest.max(begun.elapsed());
    }
    Ok(known)
}

struct Shoppers {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<Known>>>,
}

impl Shoppers {
    fn open(proxies: [&Proxy; 2]) -> Shoppers {
        let stop = Arc::new(AtomicBool::new(false));
        let tasks = (0..CLIENTS)
            .map(|number| tokio::spawn(shopper(proxies[number % 2].dsn("shop"), number, Arc::clone(&stop))))
            .collect();
        Shoppers { stop, tasks }
    }

    /// All that they know is there, and nothing else.
    async fn close(self, client: &Client, directs: &[Client]) -> Result<()> {
        self.stop.store(true, SeqCst);
        let mut known = Known::default();
        for task in self.tasks {
            let one = task.await??;
            known.users.extend(one.users);
            known.notes.extend(one.notes);
            known.stocked += one.stocked;
            known.slowest = known.slowest.max(one.slowest);
        }
        println!("{} users, slowest round {:?}", known.users.len(), known.slowest);
        let of = |list: Vec<String>| list.into_iter().collect::<BTreeSet<_>>();
        let users: Vec<String> = known.users.iter().map(|(id, email)| format!("{id} {email} 2")).collect();
        let found = column(client, "SELECT user_id || ' ' || email || ' ' || visits FROM users").await?;
        ensure!(found.len() == users.len() && of(found) == of(users), "other users are there than signed up");
        let notes: Vec<String> = known.notes.iter().map(|(user, note)| format!("{user} {note}")).collect();
        let found = column(client, "SELECT user_id || ' ' || note_id FROM notes").await?;
        ensure!(found.len() == notes.len() && of(found) == of(notes), "other notes are there than were written");
        let numbers: BTreeSet<i64> = known.notes.iter().map(|(_, note)| *note).collect();
        ensure!(numbers.len() == known.notes.len(), "a number was given out twice");
        for direct in directs {
            let stock = column(direct, "SELECT stock FROM products WHERE name = 'tea'").await?;
            ensure!(stock == [known.stocked.to_string()], "{stock:?} of {}", known.stocked);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_becomes_two_while_clients_go_on() -> Result<()> {
    let (tier, second, added, console) = alone().await?;
    let shoppers = Shoppers::open([tier.proxy(), &second]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A transaction and a session of before.
    let open = second.connect().await?;
    open.batch_execute("BEGIN; UPDATE products SET stock = 7 WHERE name = 'cup'; SAVEPOINT one").await?;
    let session = tier.connect().await?;
    session.batch_execute("PREPARE mine AS SELECT count(*) FROM users").await?;
    let other = tier.connect().await?;
    let prepared = other.prepare("SELECT count(*) FROM notes WHERE user_id > $1").await?;

    rows(&console, &add(&added)).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // It ends as it began, and nothing moves before.
    open.batch_execute("INSERT INTO users (email, visits) VALUES ('open', 2); ROLLBACK TO one; RELEASE one").await?;
    assert_eq!(rows(&console, "SHOW MOVES").await?[0].get("phase"), Some("queued"));
    assert_eq!(column(&session, "EXECUTE mine").await?.len(), 1);
    open.batch_execute("COMMIT").await?;

    all_reach(&console, "ready").await?;
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let refused = session.batch_execute("EXECUTE mine").await.expect_err("it would ask one of two");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("0A000"), "{refused:?}");
    session.batch_execute("DEALLOCATE ALL").await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;

    let client = second.connect().await?;
    let directs = [tier.shards[0].primary.admin("shop").await?, added.admin("shop").await?];
    let logs = || format!("{}\n{}", tier.proxy().weir_log(), second.weir_log());
    shoppers.close(&client, &directs).await.with_context(logs)?;
    let all: i64 = session.query_one("SELECT count(*) FROM notes", &[]).await?.get(0);
    assert_eq!(other.query_one(&prepared, &[&0_i64]).await?.get::<_, i64>(0), all);
    assert_eq!(column(&directs[1], "SELECT stock FROM products WHERE name = 'cup'").await?, ["7"]);
    for direct in &directs {
        assert!(column(direct, "SELECT count(*) > 10 FROM users").await? == ["t"], "nobody lives there");
        nothing_is_left_on(direct).await?;
    }
    are_in_step(&directs).await?;
    // Its config file names one shard still.
    tier.restart_weir().await?;
    assert_eq!(column(&tier.connect().await?, "SELECT count(*) FROM notes").await?, [all.to_string()]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_before_changes_nothing_that_a_new_shard_has_too() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(&["users(user_id bigint)", "products"]).start().await?;
    let client = tier.connect().await?;
    client
        .batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY); CREATE TABLE products (product_id int PRIMARY KEY, stock int);
                        INSERT INTO products VALUES (1, 0)")
        .await?;
    let added = empty_server(&tier).await?;
    let console = connect(&tier.admin_dsn()).await?;
    let [stays, goes] = [tier.connect().await?, tier.connect().await?];
    for (snapshot, isolation) in [(&stays, "READ COMMITTED"), (&goes, "REPEATABLE READ")] {
        snapshot.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}; SELECT * FROM products")).await?;
    }
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '{}'", added.address())).await?;
    all_reach(&console, "ready").await?;
    stays.batch_execute("UPDATE products SET stock = stock + 1").await?;
    stays.batch_execute("COMMIT").await?;
    let made = "CREATE INDEX products_by_stock ON products (stock)";
    let gone = goes.batch_execute(made).await.expect_err("the new shard would not get it");
    assert_eq!(gone.code().map(tokio_postgres::error::SqlState::code), Some("40001"), "{gone:?}");
    for statement in ["ROLLBACK", "BEGIN ISOLATION LEVEL REPEATABLE READ", made, "COMMIT"] {
        goes.batch_execute(statement).await.context(statement)?;
    }
    for direct in [tier.shards[0].primary.admin("shop").await?, added.admin("shop").await?] {
        assert_eq!(column(&direct, "SELECT stock FROM products").await?, ["1"]);
        assert_eq!(column(&direct, "SELECT to_regclass('products_by_stock') IS NOT NULL").await?, ["t"]);
    }
    Ok(())
}
