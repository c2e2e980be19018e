//! The rights that docs/dba.md lists are enough for a whole move, each of them is needed, and the plan says which is missing.

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_harness::{Server, Tier};

use super::{SLOTS, all_reach, filled, nothing_is_left, on_shards, order, reaches, rows};
use crate::placement::column;

/// As docs/dba.md has them ("Moving slots").
const GRANTS: [(&str, &str, &str); 4] = [
    ("ALTER ROLE weir REPLICATION", "ALTER ROLE weir NOREPLICATION", "may not replicate"),
    (
        "GRANT CREATE ON DATABASE shop TO weir",
        "REVOKE CREATE ON DATABASE shop FROM weir",
        "may not create publications and schema weir",
    ),
    (
        "GRANT SET ON PARAMETER session_replication_role TO weir",
        "REVOKE SET ON PARAMETER session_replication_role FROM weir",
        "may not set session_replication_role",
    ),
    ("GRANT shop TO weir", "REVOKE shop FROM weir", "does not own it"),
];
const PASSWORD: &str = "of least privilege";

async fn make_role(server: &Server) -> Result<()> {
    let admin = server.admin("shop").await?;
    admin.batch_execute(&format!("CREATE ROLE weir LOGIN PASSWORD '{PASSWORD}'; GRANT pg_monitor TO weir")).await?;
    for (grant, ..) in GRANTS {
        admin.batch_execute(grant).await?;
    }
    Ok(())
}

/// A tier whose weir logs in to the shards as a role that has the rights of the list and no others.
async fn least() -> Result<Tier> {
    let tier = Tier::builder().shards(2).start().await?;
    tier.stop_weir();
    for shard in &tier.shards {
        let admin = shard.primary.admin("shop").await?;
        // What the first start has made as a superuser.
        for sql in [
            "DROP EVENT TRIGGER IF EXISTS weir_ddl",
            "DROP EVENT TRIGGER IF EXISTS weir_drop",
            "DROP SCHEMA weir CASCADE",
            "DO $$ DECLARE p name; BEGIN FOR p IN SELECT pubname FROM pg_publication LOOP \
             EXECUTE format('DROP PUBLICATION %I', p); END LOOP; END $$",
        ] {
            admin.batch_execute(sql).await.with_context(|| sql.to_owned())?;
        }
        make_role(&shard.primary).await?;
    }
    let path = tier.run.path().join("weir.toml");
    let mut config: toml::Table = std::fs::read_to_string(&path)?.parse()?;
    config["server_auth"].as_table_mut().context("server_auth")?.insert("user".to_owned(), "weir".into());
    std::fs::write(&path, toml::to_string(&config)?)?;
    std::fs::write(tier.run.path().join("admin.pw"), format!("{PASSWORD}\n"))?;
    tier.restart_weir().await?;
    Ok(tier)
}

async fn blockers(console: &Client, goal: &str) -> Result<Vec<String>> {
    let plan = rows(console, &format!("RESHARD PLAN {goal}")).await?;
    let text = |name, row: &tokio_postgres::SimpleQueryRow| row.get(name).unwrap_or_default().to_owned();
    let blockers = plan.iter().filter(|row| row.get("what") == Some("blocker"));
    Ok(blockers.map(|row| format!("{} {} {}", text("from", row), text("to", row), text("note", row))).collect())
}

/// Nobody creates in a database because he is its owner.
async fn take_over(server: &Server) -> Result<()> {
    let admin = server.admin("shop").await?;
    Ok(admin.batch_execute("ALTER DATABASE shop OWNER TO weir_admin; GRANT ALL ON SCHEMA public TO shop").await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_the_list_are_enough_and_each_is_missed() -> Result<()> {
    let tier = least().await?;
    for shard in &tier.shards {
        take_over(&shard.primary).await?;
    }
    filled(&tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let goal = format!("MOVE SLOTS {SLOTS} TO shard1");
    assert_eq!(blockers(&console, &goal).await?, Vec::<String>::new());
    for shard in &tier.shards {
        let admin = shard.primary.admin("shop").await?;
        for (grant, revoke, said) in GRANTS {
            admin.batch_execute(revoke).await?;
            let found = blockers(&console, &goal).await?;
            assert!(found.iter().any(|one| one.contains(said)), "{}: {revoke}: {found:?}", shard.name);
            let refused = console.simple_query(&format!("RESHARD START {goal}")).await;
            assert!(refused.is_err(), "{revoke}");
            admin.batch_execute(grant).await?;
        }
    }
    assert_eq!(blockers(&console, &goal).await?, Vec::<String>::new());
    let (before, client) = (on_shards(&tier).await?, tier.connect().await?);
    // There, and back.
    order(&console, &format!("RESHARD START {goal}")).await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    client.batch_execute("UPDATE users SET name = 'moved' WHERE user_id IN (1, 2, 3, 4)").await?;
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    nothing_is_left(&tier).await?;
    // There, and it stays.
    order(&console, &format!("RESHARD START {goal}")).await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    nothing_is_left(&tier).await?;
    let after = on_shards(&tier).await?;
    assert_eq!(after[0].len() + after[1].len(), before[0].len() + before[1].len());
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE name = 'moved'").await?, ["4"]);
    for user in 1..=100_i64 {
        client.query_one("SELECT name FROM users WHERE user_id = $1", &[&user]).await?;
    }
    Ok(())
}

/// Roles and their passwords are made by hand, as far as weir's account may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_added_with_the_rights_of_the_list() -> Result<()> {
    let tier = least().await?;
    filled(&tier).await?;
    let client = tier.connect().await?;
    client.batch_execute("INSERT INTO products VALUES (1, 'pen', 100)").await?;
    let added = crate::reshard::empty_server(&tier).await?;
    make_role(&added).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let goal = format!("ADD SHARD shard2 '{}'", added.address());
    assert_eq!(blockers(&console, &goal).await?, Vec::<String>::new());
    rows(&console, &format!("RESHARD START {goal}")).await?;
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    let direct = added.admin("shop").await?;
    assert_eq!(column(&direct, "SELECT name FROM products").await?, ["pen"]);
    let found: i64 = column(&direct, "SELECT count(*) FROM users").await?[0].parse()?;
    assert!(found > 100, "{found}");
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, [super::USERS.to_string()]);
    Ok(())
}
