//! What this process goes by where others can read it: at the servers, and in Redis.
//!
//! Invariant: names of a tier come from the secret that its members share, one for each purpose, and do not give it away.

use std::hash::BuildHasher as _;

use weir_core::fresh::sign::{FleetName, Scope, Sign};

use crate::config::{Config, DatabaseConfig, PeersConfig, PeersMode};

/// Of the keys in Redis. Proxies that hear of each other's writes before they are visible share what they store; others find nothing
/// but what they have stored themselves.
pub fn namespace(config: &Config) -> String {
    let name = match &config.peers {
        Some(peers) if peers.mode == PeersMode::Leased => of_tier(peers, b"weir redis"),
        _ => rand::random::<u64>(),
    };
    format!("weir:{name:016x}")
}

/// What this process says of itself to others in front of the servers of a database.
pub fn sign(config: &Config, database: &DatabaseConfig) -> Sign {
    let process = foldhash::quality::FixedState::with_seed(13).hash_one(crate::map::proxy_id()) as u32;
    let fleet = config.peers.as_ref().map(|peers| FleetName::of(of_tier(peers, b"weir sign")));
    Sign { scope: if database.is_wildcard() { Scope::Server } else { Scope::Database }, fleet, process }
}

fn of_tier(peers: &PeersConfig, purpose: &[u8]) -> u64 {
    let digest = crate::auth::scram::hmac(peers.secret.expose().as_bytes(), &[purpose]);
    digest.iter().take(8).fold(0, |name, byte| name << 8 | u64::from(*byte))
}
