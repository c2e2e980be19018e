//! The Postgres side: one connection ([`conn`]) over plain TCP or TLS ([`stream`], [`tls`]), logging in ([`connect`]), and sharing
//! connections ([`pool`]).

pub mod conn;
pub mod connect;
pub mod pool;
pub mod stream;
pub mod tls;
