//! Who a client is, and who weir is to a server: SCRAM-SHA-256(-PLUS) and MD5 in both directions.
//!
//! A client's login: [`directory`] says who the user is (users file, then [`query`]), [`scram_server`] checks the proof, and
//! what the proof gave away becomes the [`credential`] that [`scram_client`] presents to the servers.
//!
//! Invariant: exchanges are state machines over message bodies without IO, so that a session can hold them and a test can
//! run them without sockets. A password, proof or key is never in an error or a Debug output.
//!
//! Non-goals: HBA rules (`weir_core::hba`), TLS.

pub mod certificate;
pub mod credential;
pub mod directory;
pub mod query;
pub mod scram;
pub mod scram_client;
pub mod scram_server;
pub mod secret;
