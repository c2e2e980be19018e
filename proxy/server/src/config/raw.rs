//! The file as written: every key there is, with its place, and no judgement beyond types.
//!
//! The commented example of every key is `config/weir.toml`; a test keeps the two together.

#![expect(clippy::struct_field_names, reason = "the fields are the file's keys, which end with their unit")]

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use super::value::{Size, Time};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub listen: Option<Spanned<String>>,
    pub http_listen: Option<Spanned<String>>,
    pub users_file: Option<Spanned<String>>,
    pub hba_file: Option<Spanned<String>>,
    pub auth_query: Option<AuthQuery>,
    pub upstream: Option<Spanned<String>>,
    #[serde(default)]
    pub replicas: Vec<Spanned<String>>,
    #[serde(default)]
    pub shards: Vec<Spanned<String>>,
    pub workers: Option<Spanned<i64>>,
    pub zone: Option<Spanned<String>>,
    pub zone_env: Option<Spanned<String>>,
    #[serde(default)]
    pub server_zones: BTreeMap<Spanned<String>, Spanned<String>>,
    #[serde(default)]
    pub admin_users: Vec<Spanned<String>>,
    #[serde(default)]
    pub stats_users: Vec<Spanned<String>>,
    pub hub: Option<Spanned<Hub>>,
    #[serde(default)]
    pub engine: Engine,
    #[serde(default)]
    pub database: BTreeMap<Spanned<String>, Database>,
    #[serde(default)]
    pub user: BTreeMap<String, Overrides>,
    #[serde(default)]
    pub pool: Pool,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub reshard: Reshard,
    #[serde(default)]
    pub cache: Cache,
    pub peers: Option<Spanned<Peers>>,
    pub tls: Option<Tls>,
    pub server_tls: Option<Spanned<ServerTls>>,
    pub server_auth: Option<Spanned<ServerAuth>>,
    #[serde(default)]
    pub log: Log,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hub {
    pub dsn: Option<Spanned<String>>,
    pub dsn_file: Option<Spanned<String>>,
    pub dsn_env: Option<Spanned<String>>,
    #[serde(default)]
    pub replicas: Vec<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Engine {
    pub enabled: Option<bool>,
    pub database: Option<Spanned<String>>,
    pub partitions: Option<bool>,
    pub pool_size: Option<Spanned<i64>>,
    pub wait_max: Option<Spanned<Time>>,
    pub server_ca: Option<Spanned<String>>,
    pub work_mem: Option<Spanned<Size>>,
    pub temp_bytes_max: Option<Spanned<Size>>,
    pub rows_max: Option<Spanned<i64>>,
    pub time_max: Option<Spanned<Time>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Database {
    pub server_database: Option<Spanned<String>>,
    #[serde(default)]
    pub shard: Vec<Shard>,
    #[serde(default)]
    pub table: Vec<Table>,
    pub home: Option<Spanned<String>>,
    pub freshness: Option<Spanned<String>>,
    pub replica_wait_max: Option<Spanned<Time>>,
    pub connections_max: Option<Spanned<i64>>,
    pub pool_size: Option<Spanned<i64>>,
    pub pool_min: Option<Spanned<i64>>,
    pub pool_reserve: Option<Spanned<i64>>,
    pub pool_mode: Option<Spanned<String>>,
}

/// What `[user.<name>]` may say; `[database.<name>]` has the same keys among its own.
#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields)]
pub(super) struct Overrides {
    pub connections_max: Option<Spanned<i64>>,
    pub pool_size: Option<Spanned<i64>>,
    pub pool_min: Option<Spanned<i64>>,
    pub pool_reserve: Option<Spanned<i64>>,
    pub pool_mode: Option<Spanned<String>>,
    pub freshness: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shard {
    pub name: Spanned<String>,
    pub primary: Spanned<String>,
    #[serde(default)]
    pub replicas: Vec<Spanned<String>>,
    pub weight: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    pub schema: Option<Spanned<String>>,
    pub name: Spanned<String>,
    pub kind: Spanned<String>,
    pub key: Option<Spanned<String>>,
    #[serde(rename = "type")]
    pub key_type: Option<Spanned<String>>,
    pub global_unique: Option<Vec<Spanned<String>>>,
    pub cache: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Pool {
    pub size: Option<Spanned<i64>>,
    pub min: Option<Spanned<i64>>,
    pub reserve: Option<Spanned<i64>>,
    pub reserve_after: Option<Spanned<Time>>,
    pub mode: Option<Spanned<String>>,
    pub wait_queue_max: Option<Spanned<i64>>,
    pub wait_max: Option<Spanned<Time>>,
    pub idle_max: Option<Spanned<Time>>,
    pub lifetime_max: Option<Spanned<Time>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub client_connections_max: Option<Spanned<i64>>,
    pub user_connections_max: Option<Spanned<i64>>,
    pub database_connections_max: Option<Spanned<i64>>,
    pub wildcard_databases_max: Option<Spanned<i64>>,
    pub wildcard_idle_max: Option<Spanned<Time>>,
    pub idle_client_max: Option<Spanned<Time>>,
    pub idle_in_transaction_max: Option<Spanned<Time>>,
    pub query_time_max: Option<Spanned<Time>>,
    pub transaction_time_max: Option<Spanned<Time>>,
    pub login_time_max: Option<Spanned<Time>>,
    pub connect_time_max: Option<Spanned<Time>>,
    pub message_bytes_max: Option<Spanned<Size>>,
    pub merge_bytes_max: Option<Spanned<Size>>,
    pub merge_groups_max: Option<Spanned<i64>>,
    pub prepared_per_server_max: Option<Spanned<i64>>,
    pub sequence_block: Option<Spanned<i64>>,
    pub drain_time_max: Option<Spanned<Time>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Reshard {
    pub copies: Option<Spanned<i64>>,
    pub index_memory: Option<Spanned<Size>>,
    pub index_workers: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Cache {
    pub enabled: Option<bool>,
    pub redis: Option<Spanned<String>>,
    pub redis_file: Option<Spanned<String>>,
    pub redis_env: Option<Spanned<String>>,
    pub redis_user: Option<Spanned<String>>,
    pub redis_password_file: Option<Spanned<String>>,
    pub redis_password_env: Option<Spanned<String>>,
    pub redis_sentinel_password_file: Option<Spanned<String>>,
    pub redis_sentinel_password_env: Option<Spanned<String>>,
    pub redis_ca: Option<Spanned<String>>,
    pub redis_certificate: Option<Spanned<String>>,
    pub redis_key: Option<Spanned<String>>,
    pub l1_bytes: Option<Spanned<Size>>,
    pub entry_bytes_max: Option<Spanned<Size>>,
    pub compress_above: Option<Spanned<Size>>,
    pub max_age: Option<Spanned<Time>>,
    pub decoding: Option<Spanned<String>>,
    pub other_weirs: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Peers {
    pub listen: Spanned<String>,
    pub advertise: Option<Spanned<String>>,
    pub advertise_env: Option<Spanned<String>>,
    pub secret_file: Option<Spanned<String>>,
    pub secret_env: Option<Spanned<String>>,
    pub mode: Option<Spanned<String>>,
    pub lease: Option<Spanned<Time>>,
    pub ca: Option<Spanned<String>>,
    pub certificate: Option<Spanned<String>>,
    pub key: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tls {
    pub certificate: Spanned<String>,
    pub key: Spanned<String>,
    pub client_ca: Option<Spanned<String>>,
    pub mode: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerAuth {
    pub user: Spanned<String>,
    pub password_file: Option<Spanned<String>>,
    pub password_env: Option<Spanned<String>>,
    pub passfile: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerTls {
    pub mode: Option<Spanned<String>>,
    pub ca: Option<Spanned<String>>,
    pub certificate: Option<Spanned<String>>,
    pub key: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthQuery {
    pub query: Option<Spanned<String>>,
    pub database: Option<Spanned<String>>,
    pub max_age: Option<Spanned<Time>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    pub level: Option<Spanned<String>>,
    pub format: Option<Spanned<String>>,
}
