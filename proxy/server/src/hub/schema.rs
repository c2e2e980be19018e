//! Schema `weir`: made once, idempotently, under an advisory lock that every proxy takes.

use tokio_postgres::{Client, Transaction};
use weir_core::lock;
use weir_core::topology::{SlotMap, TableRules};

use super::shards::addresses;
use super::{HubError, RuleArrays};
use crate::config::DatabaseConfig;

/// Version of the statements below.
const VERSION: i32 = 3;

pub(super) const TABLES: &str = "
CREATE SCHEMA IF NOT EXISTS weir;
CREATE TABLE IF NOT EXISTS weir.schema_version (version integer NOT NULL);
CREATE TABLE IF NOT EXISTS weir.topology (
    database text PRIMARY KEY,
    epoch    bigint NOT NULL CHECK (epoch > 0)
);
CREATE TABLE IF NOT EXISTS weir.shard (
    database text NOT NULL REFERENCES weir.topology,
    id       smallint NOT NULL CHECK (id >= 0),
    name     text NOT NULL,
    weight   integer NOT NULL CHECK (weight > 0),
    PRIMARY KEY (database, id),
    UNIQUE (database, name)
);
CREATE TABLE IF NOT EXISTS weir.slot (
    database text NOT NULL,
    slot     smallint NOT NULL CHECK (slot BETWEEN 0 AND 4095),
    shard    smallint NOT NULL,
    epoch    bigint NOT NULL,
    PRIMARY KEY (database, slot),
    FOREIGN KEY (database, shard) REFERENCES weir.shard
);
CREATE TABLE IF NOT EXISTS weir.table_rule (
    database    text NOT NULL REFERENCES weir.topology,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    kind        text NOT NULL CHECK (kind IN ('sharded', 'reference', 'global')),
    key_column  text,
    key_type    text,
    PRIMARY KEY (database, schema_name, table_name),
    CHECK ((kind = 'sharded') = (key_column IS NOT NULL AND key_type IS NOT NULL))
);
INSERT INTO weir.schema_version SELECT 1 WHERE NOT EXISTS (SELECT FROM weir.schema_version);
";

/// What version 2 has beyond version 1: where a shard's servers are (first the primary, as host:port), and whether it takes part; slots
/// on their way, and which proxy works by which epoch.
const MOVES: &str = "
ALTER TABLE weir.shard
    ADD COLUMN IF NOT EXISTS servers text[] NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS state text NOT NULL DEFAULT 'active' CHECK (state IN ('joining', 'entering', 'active', 'retired'));
CREATE TABLE IF NOT EXISTS weir.move (
    id          integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    database    text NOT NULL,
    source      smallint NOT NULL,
    target      smallint NOT NULL CHECK (source <> target),
    slots       text NOT NULL,
    phase       text NOT NULL,
    aim         text NOT NULL,
    paused      boolean NOT NULL DEFAULT false,
    made_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    since       timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows_total  bigint NOT NULL DEFAULT 0,
    rows_done   bigint NOT NULL DEFAULT 0,
    bytes_done  bigint NOT NULL DEFAULT 0,
    changes     bigint NOT NULL DEFAULT 0,
    lag_bytes   bigint NOT NULL DEFAULT 0,
    paused_us   bigint,
    error       text,
    FOREIGN KEY (database, source) REFERENCES weir.shard (database, id),
    FOREIGN KEY (database, target) REFERENCES weir.shard (database, id)
);
CREATE TABLE IF NOT EXISTS weir.proxy (
    database text NOT NULL,
    id       text NOT NULL,
    epoch    bigint NOT NULL,
    seen     timestamptz NOT NULL,
    PRIMARY KEY (database, id)
);
";

/// What version 3 has beyond version 2: keys with an owner of their own, by hash, and shards that have nothing else (weight 0).
const KEYS: &str = "
CREATE TABLE IF NOT EXISTS weir.isolated_key (
    database text NOT NULL,
    hash     bigint NOT NULL,
    key      text NOT NULL,
    shard    smallint NOT NULL,
    PRIMARY KEY (database, hash),
    FOREIGN KEY (database, shard) REFERENCES weir.shard (database, id)
);
ALTER TABLE weir.shard DROP CONSTRAINT IF EXISTS shard_weight_check, ADD CONSTRAINT shard_weight_check CHECK (weight >= 0);
";

/// And what has happened to a move, how much it may burden its servers, and why it waits.
const MOVE_NOTICES: &str = "
ALTER TABLE weir.move
    ADD COLUMN IF NOT EXISTS notice text,
    ADD COLUMN IF NOT EXISTS limits text NOT NULL DEFAULT '',
    ADD COLUMN IF NOT EXISTS held_by text;
";

/// And weights that count once moves are done, and what each proxy has measured of slots: statements and microseconds, per second.
const LOADS: &str = "
ALTER TABLE weir.shard ADD COLUMN IF NOT EXISTS next_weight integer CHECK (next_weight >= 0);
CREATE TABLE IF NOT EXISTS weir.slot_load (
    database   text NOT NULL,
    proxy      text NOT NULL,
    seen       timestamptz NOT NULL,
    slots      smallint[] NOT NULL,
    statements float8[] NOT NULL,
    time_us    float8[] NOT NULL,
    PRIMARY KEY (database, proxy)
);
";

/// And owners of slots in one row, by slot: statements wait for a change of owner, of thousands of slots as well. What was a row for each
/// is seen, and set right by people, as before.
const OWNERS: &str = "
ALTER TABLE weir.topology ADD COLUMN owners smallint[] NOT NULL DEFAULT '{}';
UPDATE weir.topology t SET owners = ARRAY(
    SELECT l.shard FROM generate_series(0, 4095) number
    LEFT JOIN weir.slot l ON l.database = t.database AND l.slot = number ORDER BY number);
DROP TABLE weir.slot;
CREATE VIEW weir.slot AS
    SELECT t.database, (o.place - 1)::smallint AS slot, o.shard
    FROM weir.topology t, unnest(t.owners) WITH ORDINALITY AS o(shard, place);
CREATE FUNCTION weir.give_slot() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE weir.topology SET owners[old.slot + 1] = new.shard WHERE database = old.database;
    RETURN new;
END $$;
CREATE TRIGGER give_slot INSTEAD OF UPDATE ON weir.slot FOR EACH ROW EXECUTE FUNCTION weir.give_slot();
";

pub(super) async fn ensure(client: &mut Client) -> Result<(), HubError> {
    let transaction = client.transaction().await?;
    lock(&transaction).await?;
    let exists: bool =
        transaction.query_one("SELECT to_regclass('weir.schema_version') IS NOT NULL", &[]).await?.try_get(0)?;
    if !exists {
        transaction.batch_execute(TABLES).await?;
    }
    let found: i32 = transaction.query_one("SELECT max(version) FROM weir.schema_version", &[]).await?.try_get(0)?;
    known(found)?;
    for (version, script) in [(2, MOVES), (3, KEYS), (3, MOVE_NOTICES), (3, LOADS), (3, OWNERS)] {
        if found < version {
            transaction.batch_execute(script).await?;
        }
    }
    transaction.execute("UPDATE weir.schema_version SET version = $1 WHERE version < $1", &[&VERSION]).await?;
    transaction.commit().await?;
    Ok(())
}

/// Is this a version that this weir understands?
pub(super) fn known(found: i32) -> Result<(), HubError> {
    if found > VERSION { Err(HubError::TooNew { found, known: VERSION }) } else { Ok(()) }
}

/// Serialises everything that changes the hub; released with the transaction.
pub(super) async fn lock(transaction: &Transaction<'_>) -> Result<(), HubError> {
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&lock::HUB]).await?;
    Ok(())
}

/// Writes a database that the hub does not know yet, with epoch 1.
pub(super) async fn store(
    transaction: &Transaction<'_>,
    database: &DatabaseConfig,
    slots: &SlotMap,
) -> Result<(), HubError> {
    let name = &database.name;
    let owners: Vec<i16> = slots.owners().iter().map(|owner| owner.0 as i16).collect();
    let sql = "INSERT INTO weir.topology (database, epoch, owners) VALUES ($1, 1, $2) ON CONFLICT DO NOTHING";
    transaction.execute(sql, &[name, &owners]).await?;
    for (index, shard) in database.shards.iter().enumerate() {
        let row: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [name, &(index as i16), &shard.name, &(shard.weight as i32), &addresses(shard)];
        transaction
            .execute("INSERT INTO weir.shard (database, id, name, weight, servers) VALUES ($1, $2, $3, $4, $5)", &row)
            .await?;
    }
    store_rules(transaction, name, &database.rules()).await
}

/// The config declares the tables; the hub's copy is for people and tools. Written only where it differs, so that a
/// start without changes leaves no dead rows.
pub(super) async fn store_rules(
    transaction: &Transaction<'_>,
    database: &str,
    rules: &TableRules,
) -> Result<(), HubError> {
    let rules = RuleArrays::of(rules);
    transaction
        .execute(
            "DELETE FROM weir.table_rule WHERE database = $1 AND (schema_name, table_name) NOT IN \
             (SELECT * FROM unnest($2::text[], $3::text[]))",
            &[&database, &rules.schemas, &rules.names],
        )
        .await?;
    transaction
        .execute(
            "INSERT INTO weir.table_rule AS r (database, schema_name, table_name, kind, key_column, key_type) \
             SELECT $1, u.* FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) AS u \
             ON CONFLICT (database, schema_name, table_name) DO UPDATE \
             SET kind = excluded.kind, key_column = excluded.key_column, key_type = excluded.key_type \
             WHERE (r.kind, r.key_column, r.key_type) IS DISTINCT FROM (excluded.kind, excluded.key_column, excluded.key_type)",
            &[&database, &rules.schemas, &rules.names, &rules.kinds, &rules.keys, &rules.types],
        )
        .await?;
    Ok(())
}
