//! `weir doctor`: what interrupted moves have left on the shards, and rows that lie where they do not belong.
//!
//! Invariant: nothing of a move that is not over is touched, and no row is ever deleted. Non-goals: what a running weir mends by itself
//! (moves, prepared transactions), and schemas that differ (`weir check --connect`).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use tokio_postgres::Client;
use weir_core::id::ShardId;
use weir_core::sql::word::quote_name;
use weir_core::topology::spread::{Spread, spread};
use weir_core::topology::{KeySet, ShardState, Topology, in_sql};

use crate::app::control_login;
use crate::config::{Config, DatabaseConfig};
use crate::hub::{Hub, HubMap};

#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Where hub and servers are named
    #[arg(value_name = "FILE", default_value = "weir.toml")]
    config: PathBuf,
    /// Take away what is left of moves that are over
    #[arg(long)]
    repair: bool,
}

/// Everything that bears a move's number: what it is, the number, and what takes it away. Triggers come before their functions.
const LEFT: &str = r"
SELECT * FROM (
    SELECT 1 AS turn, 'trigger ' || tgname || ' of ' || tgrelid::regclass AS what, substring(tgname from '\d+')::int AS id,
           format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass) AS remedy
    FROM pg_trigger WHERE tgname ~ '^zzzz_weir_move_\d+(_all)?$'
    UNION ALL SELECT 2, 'function weir.' || proname, substring(proname from '^move_(\d+)_')::int, format('DROP FUNCTION weir.%I()', proname)
    FROM pg_proc WHERE pronamespace = to_regnamespace('weir') AND proname ~ '^move_\d+_guard_([0-9a-f]+|all)$'
    UNION ALL SELECT 3, 'sequence weir.' || relname, substring(relname from '^move_(\d+)_')::int, format('DROP SEQUENCE weir.%I', relname)
    FROM pg_class WHERE relnamespace = to_regnamespace('weir') AND relname ~ '^move_\d+_fence$'
    UNION ALL SELECT 4, 'publication ' || pubname, substring(pubname from '\d+$')::int, format('DROP PUBLICATION %I', pubname)
    FROM pg_publication WHERE pubname ~ '^weir_move_\d+$'
    UNION ALL SELECT 5, 'replication slot ' || slot_name, substring(slot_name from '\d+$')::int,
           format('SELECT pg_drop_replication_slot(%L)', slot_name)
    FROM pg_replication_slots WHERE slot_name ~ '^weir_move_\d+$' AND database = current_database()
) AS found ORDER BY turn, what";

/// What was found, and done.
pub async fn run(arguments: DoctorArgs) -> Result<String> {
    let config = Config::load(&arguments.config).map_err(anyhow::Error::from)?;
    let hub = config.hub.as_ref().context("there is no [hub] in this file, so no slots can have moved")?;
    let hub = Hub::connect(hub).await?;
    let mut findings = Findings { text: String::new(), count: 0, repair: arguments.repair };
    for database in &config.databases {
        let map = hub.read(database).await?;
        let moves = hub.moves(&database.name, false).await?;
        let open: BTreeSet<i32> = moves.iter().map(|one| one.id).collect();
        examine(&config, database, (&map, &open), &mut findings).await?;
    }
    match findings.count {
        0 => findings.text.push_str("Nothing is left of any move, and every row is where it belongs.\n"),
        _ if arguments.repair => {}
        _ => findings
            .text
            .push_str("weir doctor --repair takes away what is left of moves; rows are yours to look at.\n"),
    }
    Ok(findings.text)
}

struct Findings {
    text: String,
    count: usize,
    repair: bool,
}

async fn examine(
    config: &Config,
    database: &DatabaseConfig,
    (map, open): (&HubMap, &BTreeSet<i32>),
    findings: &mut Findings,
) -> Result<()> {
    for (number, shard) in map.shards.iter().enumerate() {
        let id = ShardId(number as u16);
        if map.topology.roster.state(id) == Some(ShardState::Retired) {
            continue;
        }
        let place = format!("{}/{}", database.name, shard.name);
        let client = crate::control::connect(&control_login(config, database, &shard.primary)).await?;
        left_of_moves(&client, &place, open, findings).await.with_context(|| place.clone())?;
        strangers(&client, &place, (&map.topology, id), findings).await.with_context(|| place.clone())?;
    }
    Ok(())
}

async fn left_of_moves(client: &Client, place: &str, open: &BTreeSet<i32>, findings: &mut Findings) -> Result<()> {
    for row in client.query(LEFT, &[]).await? {
        let (what, id, remedy): (String, i32, String) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        if open.contains(&id) {
            continue;
        }
        findings.count += 1;
        let done = if findings.repair {
            match client.batch_execute(&remedy).await {
                Ok(()) => "taken away".to_owned(),
                Err(error) => bail!("{remedy}: {error}"),
            }
        } else {
            remedy
        };
        let _ = writeln!(findings.text, "{place}: {what}, of move {id}, which is over: {done}");
    }
    Ok(())
}

/// Rows of keys that the shard does not own, and that no move explains.
async fn strangers(
    client: &Client,
    place: &str,
    (map, id): (&Topology, ShardId),
    findings: &mut Findings,
) -> Result<()> {
    let mut expected = map.slots.owned_by(id);
    if let Some(guests) = map.moves.guests(id) {
        expected = expected.with(guests);
    }
    let by_slot = KeySet::from(expected.slots().clone());
    for table in spread(&map.tables) {
        let Spread { schema, name, key, key_type, .. } = table;
        let expected = if table.by_slot { &by_slot } else { &expected };
        let table = format!("{}.{}", quote_name(schema), quote_name(name));
        if client.query_one("SELECT to_regclass($1) IS NULL", &[&table]).await?.try_get(0)? {
            continue;
        }
        let sql =
            format!("SELECT count(*) FROM {table} WHERE {}", in_sql::outside(expected, &quote_name(key), key_type));
        let rows: i64 = client.query_one(&sql, &[]).await.context(table.clone())?.try_get(0)?;
        if rows > 0 {
            findings.count += 1;
            let _ = writeln!(
                findings.text,
                "{place}: {rows} rows of {table} are of keys that another shard owns. Statements that ask several shards may see them. \
                 They were written past weir, or restored from before a move: compare them with their owner's, then delete them."
            );
        }
    }
    Ok(())
}
