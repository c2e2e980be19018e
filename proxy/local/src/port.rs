//! Free TCP ports on loopback. A port is only known to be free at the moment it was asked: callers retry a start that
//! finds it taken.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context as _, Result};

/// A port on 127.0.0.1 that nobody listens on right now.
pub fn free() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free TCP port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

/// Whether nobody listens on `port` of 127.0.0.1 right now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// `wanted` if it is free, else another port that is; 0 wants any.
pub fn wanted_or_free(wanted: u16) -> Result<u16> {
    if wanted != 0 && is_free(wanted) { Ok(wanted) } else { free() }
}
