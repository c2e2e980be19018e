//! The Postgres wire protocol (version 3) as bytes and messages.
//!
//! Invariant: a frame is cut by its own length before anything in it is looked at, and a message view must consume its
//! body exactly; so a lying length can never make one message bleed into the next. No sockets, no clock, no runtime.
//!
//! Source of the formats: Postgres documentation, chapter "Frontend/Backend Protocol".

pub mod backend;
pub mod frame;
pub mod frontend;
pub mod peer;
pub mod pgoutput;
pub mod read;
pub mod row;
pub mod startup;
