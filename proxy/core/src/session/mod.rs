//! One client's state, kept apart from every socket.

pub mod replies;
