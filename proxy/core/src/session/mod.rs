//! One client's state, kept apart from every socket.
//!
//! [`replies`] counts what is owed; [`effect`] reads from a statement what it leaves behind in a session; [`pin`] names why
//! a session keeps its server connection; [`vars`] follows SET and RESET and replays them on another connection, starting from what [`startup`] brought.

pub mod effect;
pub mod pin;
pub mod replies;
pub mod startup;
pub mod vars;
