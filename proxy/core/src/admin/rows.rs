//! The figures behind each SHOW, as plain rows. Times are microseconds, sizes bytes, unless a name says otherwise.

use crate::id::{Epoch, Lsn, ShardId, Slot};
use crate::topology::SlotMap;

/// What a SHOW may need; parts that were not asked for stay empty.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub pools: Vec<PoolRow>,
    pub stats: Vec<StatRow>,
    pub sockets: Vec<SocketRow>,
    pub databases: Vec<DatabaseRow>,
    pub users: Vec<UserRow>,
    pub shards: Vec<ShardRow>,
    pub slots: Vec<SlotRange>,
    pub slot_load: Vec<SlotLoadRow>,
    pub endpoints: Vec<EndpointRow>,
    pub pins: Vec<PinRow>,
    pub moves: Vec<super::MovesRow>,
    pub peers: Vec<PeerRow>,
    pub prepared: Vec<PreparedRow>,
    pub engine: Vec<EngineRow>,
    pub drift: Vec<DriftRow>,
    pub decoding: Vec<DecodingRow>,
    pub unique: Vec<UniqueRow>,
    pub hot: Vec<HotRow>,
    pub digests: Vec<DigestRow>,
    /// Name and value: hits, misses, bytes, entries …
    pub cache: Vec<(String, i64)>,
    /// Name and count, for SHOW LISTS.
    pub lists: Vec<(String, i64)>,
    /// For SHOW STATE.
    pub state: Vec<(String, String)>,
    pub config: Vec<ConfigRow>,
    pub version: String,
}

/// The fallback engine of a database, or an object that it does not have.
#[derive(Clone, Debug, Default)]
pub struct EngineRow {
    pub database: String,
    /// The engine's own database on the hub.
    pub engine: String,
    /// off, starting, ready or failed; `replica`, for one of the hub; or the kind of object that is missing.
    pub state: String,
    /// Of the map it was made for.
    pub epoch: Option<Epoch>,
    /// What is missing; the address of a replica.
    pub object: Option<String>,
    /// Why it failed, why the object is missing, or how the replica stands.
    pub reason: String,
}

/// One proxy at one shard, as this one sees it.
#[derive(Clone, Debug, Default)]
pub struct PeerRow {
    pub database: String,
    pub shard: String,
    pub address: String,
    /// self or peer.
    pub role: &'static str,
    /// Of itself: out, joining, serving, left. Of a peer: told, unheard, silent (it pushes, and has not been heard for a lease), out.
    pub state: &'static str,
    /// How long this proxy may go on serving without another answer of the primary.
    pub lease_ms: Option<u64>,
    /// Writes under way that were announced by it.
    pub writes: u64,
    /// How proxies hear of writes: leased or push.
    pub mode: &'static str,
}

/// One pool: clients and server connections of a (database, user).
#[derive(Clone, Debug, Default)]
pub struct PoolRow {
    pub database: String,
    pub user: String,
    pub cl_active: u64,
    pub cl_waiting: u64,
    pub cl_active_cancel_req: u64,
    pub cl_waiting_cancel_req: u64,
    pub sv_active: u64,
    pub sv_active_cancel: u64,
    pub sv_being_canceled: u64,
    pub sv_idle: u64,
    pub sv_used: u64,
    pub sv_tested: u64,
    pub sv_login: u64,
    /// How long the oldest waiter has waited, in microseconds.
    pub wait_us_max: u64,
    /// transaction, session or statement.
    pub mode: &'static str,
}

/// Counts since the start, or per second, of one database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatCounts {
    pub server_assignments: u64,
    pub transactions: u64,
    pub queries: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub transaction_us: u64,
    pub query_us: u64,
    pub wait_us: u64,
    pub client_parses: u64,
    pub server_parses: u64,
    pub binds: u64,
    pub client_logins: u64,
}

#[derive(Clone, Debug, Default)]
pub struct StatRow {
    pub database: String,
    pub totals: StatCounts,
    /// Per second over the last period; the `*_us` fields are per transaction, query or wait.
    pub averages: StatCounts,
}

/// One client or server connection.
#[derive(Clone, Debug, Default)]
pub struct SocketRow {
    pub is_server: bool,
    pub user: String,
    pub database: String,
    /// active, waiting, idle, used, login …
    pub state: &'static str,
    pub address: String,
    pub port: u16,
    pub local_address: String,
    pub local_port: u16,
    /// `YYYY-MM-DD HH:MM:SS UTC`
    pub connect_time: String,
    pub request_time: String,
    pub wait_us: u64,
    pub close_needed: bool,
    /// `id` of the connection at the other end of the lease, if any.
    pub link: Option<u64>,
    pub remote_pid: u32,
    /// Protocol and cipher, empty when plain.
    pub tls: String,
    /// Of a client: transaction, session or statement.
    pub mode: &'static str,
    pub application_name: String,
    pub prepared_statements: u64,
    pub id: u64,
}

/// One server of one database.
#[derive(Clone, Debug, Default)]
pub struct DatabaseRow {
    pub name: String,
    pub host: String,
    pub port: u16,
    pub database: String,
    pub pool_size: u64,
    pub min_pool_size: u64,
    pub reserve_pool_size: u64,
    /// transaction, session or statement.
    pub mode: &'static str,
    /// Seconds.
    pub server_lifetime: u64,
    pub current_connections: u64,
    pub max_client_connections: u64,
    pub current_client_connections: u64,
    pub paused: bool,
}

#[derive(Clone, Debug, Default)]
pub struct UserRow {
    pub name: String,
    pub pool_size: u64,
    pub reserve_pool_size: u64,
    /// transaction, session or statement.
    pub mode: &'static str,
    pub current_connections: u64,
    /// 0: no limit.
    pub max_client_connections: u64,
    pub current_client_connections: u64,
}

#[derive(Clone, Debug)]
pub struct ShardRow {
    pub database: String,
    pub shard: ShardId,
    pub name: String,
    /// joining, active or retired
    pub state: &'static str,
    /// host:port
    pub primary: String,
    pub replicas: Vec<String>,
    pub slots: u64,
    pub weight: u32,
    pub epoch: Epoch,
    /// Did the last probe of the primary succeed?
    pub is_up: bool,
    pub replicas_up: u64,
    /// The largest lag of a replica that is up, in milliseconds.
    pub lag_ms: Option<u64>,
}

/// Neighbouring slots of one owner, or a key that has an owner of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotRange {
    pub database: String,
    pub first: u16,
    pub last: u16,
    pub shard: ShardId,
    pub shard_name: String,
    pub epoch: Epoch,
    /// Of the slot `first`: only this key.
    pub key: Option<String>,
}

/// A slot whose statements take time, over the last minutes and by this weir alone.
#[derive(Clone, Debug, Default)]
pub struct SlotLoadRow {
    pub database: String,
    pub slot: u16,
    pub shard: u16,
    pub shard_name: String,
    pub statements_per_min: u64,
    /// Microseconds of statements in each second.
    pub time_us_per_s: u64,
    /// Of the time of all slots, in thousandths.
    pub permille: u64,
}

/// One probed server.
#[derive(Clone, Debug)]
pub struct EndpointRow {
    pub database: String,
    pub shard: ShardId,
    /// What it is now: primary, replica, or why it is neither.
    pub role: &'static str,
    /// host:port
    pub address: String,
    pub is_up: bool,
    pub in_recovery: bool,
    /// As it was when it last answered.
    pub timeline: Option<u32>,
    pub replay_lsn: Option<Lsn>,
    pub lag_ms: Option<u64>,
    pub reads: u64,
    pub last_error: Option<String>,
    /// Where it is, if the configuration says so.
    pub zone: Option<String>,
}

/// Sessions that kept their server connection, by reason.
#[derive(Clone, Debug)]
pub struct PinRow {
    pub database: String,
    pub reason: &'static str,
    pub current: u64,
    pub total: u64,
}

/// A participant of a distributed transaction that waits for its decision.
#[derive(Clone, Debug, Default)]
pub struct PreparedRow {
    pub database: String,
    pub shard: String,
    pub gid: String,
    pub owner: String,
    /// When it was last looked at.
    pub age_ms: u64,
}

/// A column that is declared unique over all shards.
#[derive(Clone, Debug, Default)]
pub struct UniqueRow {
    pub database: String,
    /// `schema.table`
    pub table: String,
    pub column: String,
    /// `absent`, `building`, `valid` or `failed`.
    pub state: &'static str,
    /// Why it has failed.
    pub reason: Option<String>,
}

/// A key, or a table read or written without one, that is asked for often. Counts are of the last minutes.
#[derive(Clone, Debug, Default)]
pub struct HotRow {
    pub database: String,
    /// `schema.table`, or its hash if it is not in the catalogue any more.
    pub table: String,
    /// As text, or `#` and its hash; `None`: the table as a whole.
    pub key: Option<String>,
    /// Hits among them.
    pub reads: u64,
    pub hits: u64,
    pub writes: u64,
    /// Of all that was counted, in thousandths.
    pub permille: u64,
    /// What would give it a shard to itself, where it has so much that this is worth a thought.
    pub isolate: Option<String>,
}

/// A cacheable read, with all that its cached answer depends on.
#[derive(Clone, Debug, Default)]
pub struct DigestRow {
    pub database: String,
    pub user: String,
    /// Over the last minutes, estimated.
    pub reads: u64,
    /// Hidden from those who may not see values.
    pub statement: Option<String>,
    /// JSON, values in hexadecimal digits; hidden likewise.
    pub parameters: Option<String>,
    /// JSON: 0 text, 1 binary; empty: all text.
    pub result_formats: String,
    /// JSON: what the session has set.
    pub settings: String,
}

/// An object whose definition differs between shards, on one of them.
#[derive(Clone, Debug, Default)]
pub struct DriftRow {
    pub database: String,
    pub table: String,
    pub kind: String,
    pub name: String,
    pub shard: String,
    /// `None`: it is missing there.
    pub definition: Option<String>,
}

/// What is seen of writes that go round weir, on one shard.
#[derive(Clone, Debug, Default)]
pub struct DecodingRow {
    pub database: String,
    pub shard: String,
    /// `off`, `down`, `standby` or `up`.
    pub state: &'static str,
    /// Why it is not up.
    pub reason: String,
    /// WAL that is written and not decoded, in bytes.
    pub lag_bytes: u64,
    /// From the last decoded commit to its arrival.
    pub lag_ms: u64,
    /// Transactions being decoded.
    pub open: u64,
    /// Decoded commits that the primary does not show yet.
    pub waiting: u64,
    pub transactions: u64,
    pub words: u64,
    pub reconnects: u64,
    /// Tables that are not seen, or only in part, and DDL.
    pub gaps: String,
}

#[derive(Clone, Debug, Default)]
pub struct ConfigRow {
    pub key: String,
    pub value: String,
    pub default: Option<String>,
    /// Can RELOAD change it?
    pub is_changeable: bool,
}

/// The map of one database as ranges of slots and isolated keys, for [`Snapshot::slots`]. Keys are named to who `sees_keys`, and told
/// by their hash to others.
pub fn slot_ranges(
    database: &str,
    (epoch, slots): (Epoch, &SlotMap),
    names: &[Box<str>],
    sees_keys: bool,
) -> Vec<SlotRange> {
    let mut ranges: Vec<SlotRange> = Vec::new();
    let range = |slot: Slot, owner: ShardId, key: Option<String>| SlotRange {
        database: database.to_owned(),
        first: slot.index() as u16,
        last: slot.index() as u16,
        shard: owner,
        shard_name: names.get(usize::from(owner.0)).map_or_else(String::new, ToString::to_string),
        epoch,
        key,
    };
    for slot in Slot::all() {
        let owner = slots.owner(slot);
        match ranges.last_mut() {
            Some(range) if range.shard == owner => range.last = slot.index() as u16,
            _ => ranges.push(range(slot, owner, None)),
        }
    }
    for key in slots.isolated() {
        let name = if sees_keys { key.name.to_string() } else { format!("#{:016x}", key.hash) };
        ranges.push(range(Slot::of_hash(key.hash), key.owner, Some(name)));
    }
    ranges
}

impl StatCounts {
    /// In the order in which every STATS table shows them.
    pub fn in_order(&self) -> [u64; 12] {
        [
            self.server_assignments,
            self.transactions,
            self.queries,
            self.bytes_received,
            self.bytes_sent,
            self.transaction_us,
            self.query_us,
            self.wait_us,
            self.client_parses,
            self.server_parses,
            self.binds,
            self.client_logins,
        ]
    }
}
