//! pg_dump and psql through weir over shards: one database.

use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use weir_harness::{Plain, Tier};

use crate::placement::{column, create_schema};

fn run(name: &str, arguments: &[&str]) -> Result<Output> {
    Command::new(weir_local::Binaries::find()?.postgres(name)).args(arguments).output().with_context(|| name.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_is_dumped_once_and_restores_into_one_postgres() -> Result<()> {
    let (tier, plain) = (Tier::builder().shards(2).start().await?, Plain::start().await?);
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 1..=50_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'x')", &[&key]).await?;
    }
    let dump = run("pg_dump", &["--schema-only", "--no-owner", "--no-acl", "--schema=public", &tier.dsn("shop")])?;
    ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let script = String::from_utf8(dump.stdout)?.replace("CREATE SCHEMA public;", "");
    assert_eq!(script.matches("CREATE TABLE public.users ").count(), 1);
    let direct = weir_harness::connect(&plain.dsn()).await?;
    let plain_sql: String =
        script.lines().filter(|line| !line.starts_with('\\')).flat_map(|line| [line, "\n"]).collect();
    direct.batch_execute(&plain_sql).await?;
    direct.batch_execute("RESET ALL").await?;
    let columns = "SELECT table_name || '.' || column_name || ' ' || data_type FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1";
    assert_eq!(column(&direct, columns).await?, column(&client, columns).await?);
    // Rows have no snapshot that all shards share, and pg_dump insists on one: refused, with what to do.
    let rows = run("pg_dump", &["--data-only", "--table=public.users", &tier.dsn("shop")])?;
    assert!(!rows.status.success());
    let error = String::from_utf8_lossy(&rows.stderr).into_owned();
    assert!(error.contains("no common snapshot over several shards") && error.contains("HINT"), "{error}");
    // Their rows come through COPY, table by table.
    let copy = run("psql", &["-X", "-q", "-c", "COPY users TO STDOUT", &tier.dsn("shop")])?;
    assert_eq!(String::from_utf8_lossy(&copy.stdout).lines().count(), 50, "{copy:?}");
    let described = run("psql", &["-X", "-c", "\\d users", &tier.dsn("shop")])?;
    let text = String::from_utf8_lossy(&described.stdout).into_owned();
    assert_eq!(text.matches("\"users_pkey\" PRIMARY KEY").count(), 1, "{text}");
    Ok(())
}
