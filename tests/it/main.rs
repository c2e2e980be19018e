//! weir from outside: real Postgres, real Redis, real drivers. One binary, a module per subject.

mod auth;
mod cancel;
mod compose;
mod console;
mod copy_shards;
mod dev;
mod differential;
mod drivers;
mod freshness;
mod habits;
mod hostile;
mod journey;
mod login;
mod outage;
mod placement;
mod pooling;
mod protocol;
mod raw;
mod replication;
mod same_wire;
mod scale;
mod session;
mod shop;
mod start;
mod tls;
mod transactions;
