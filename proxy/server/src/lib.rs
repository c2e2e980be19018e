//! weir: a Postgres-wire data-tier proxy and cache.
//!
//! The path of a query, in files: `front` (listen → startup → session → simple/extended) → `statements` (what the text
//! means) → weir-core `plan` → `exec` (cache or replica, relay, fan-out) → `back` (pool, connection). Beside it: `app`
//! (wiring), `roles` (which server is a shard's primary), `servers` (bringing shards up, also while sessions run), `databases` and `database` (what is in force now), `seats` (who may connect), `sequences` (numbers for sharded tables), `fresh` and `clock` (writes announced and published),
//! `decode` (writes that go round weir), `recover`
//! (distributed transactions), `unique` (columns unique over all shards), and the operators' side: `config`, `hub`, `catalog`, `probe`, `metrics`, `http`, `console`.

pub mod admin;
pub mod advise;
pub mod app;
pub mod auth;
pub mod back;
pub mod cache;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod console;
pub mod control;
pub mod database;
pub mod databases;
pub mod decode;
pub mod dev;
pub mod digests;
pub mod doctor;
pub mod engine;
pub mod exec;
pub mod explain;
pub mod fleet;
pub mod flights;
pub mod fresh;
pub mod front;
pub mod growing;
pub mod hot;
pub mod http;
pub mod hub;
pub mod level;
pub mod load;
pub mod log;
pub mod map;
pub mod metrics;
pub mod mover;
pub mod names;
pub mod notifiers;
pub mod probe;
pub mod recover;
pub mod reload;
pub mod reshard;
pub mod roles;
pub mod seats;
pub mod sequences;
pub mod servers;
pub mod settings;
pub mod snapshot;
pub mod sole;
pub mod statements;
pub mod stats;
pub mod unique;
pub mod unsound;
pub mod warm;
