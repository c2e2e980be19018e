//! weir from outside: real Postgres, real Redis, real drivers. One binary, a module per subject.

mod cancel;
mod compose;
mod console;
mod dev;
mod differential;
mod freshness;
mod journey;
mod login;
mod outage;
mod placement;
mod protocol;
mod raw;
mod scale;
mod session;
mod shop;
mod transactions;
