//! The Postgres side: one connection ([`conn`]), logging in ([`connect`]), and sharing connections ([`pool`]).

pub mod conn;
pub mod connect;
pub mod pool;
