//! The client side, in the order of a connection's life: [`listen`] accepts, [`startup`] negotiates TLS and logs in by what
//! [`authenticate`] finds, [`session`] serves, [`replication`] passes WAL on, [`cancel`] ends statements on request.

mod authenticate;
pub mod batch;
pub mod cancel;
pub mod client;
pub mod control;
pub mod cursor;
mod described;
pub mod draw;
pub mod extended;
pub mod listen;
pub mod mode;
mod moving;
pub mod names;
mod noting;
pub mod replication;
pub mod session;
pub mod simple;
pub mod startup;
pub mod stepwise;
pub mod time_out;
pub mod tls;
pub mod transaction;
mod wait;
