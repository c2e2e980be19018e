//! Who a client is, and who weir is to a server: SCRAM-SHA-256 in both directions.
//!
//! Invariant: no IO here; exchanges are state machines over message bodies, so that a session can hold them and a test can
//! run them without sockets. A password, proof or key is never in an error or a Debug output.
//!
//! Non-goals: which users there are (the configuration says), SCRAM-SHA-256-PLUS towards clients (it needs the TLS layer's
//! certificate), client certificates, HBA rules.

pub mod scram_client;
pub mod scram_server;
pub mod secret;
