//! The Postgres side: one connection ([`conn`]) over plain TCP or TLS ([`stream`], [`tls`]), logging in ([`connect`]; to whoever is the primary: [`follow`]), and sharing
//! connections ([`pool`]).

pub mod conn;
pub mod connect;
mod follow;
pub mod pool;
pub mod stream;
pub mod tls;
pub mod walsender;
