//! A member's own writes that are under way, and who is told of them.
//!
//! Invariant: both change under one lock, so that a member that attaches learns of each write either then or by its own
//! announcement.

use std::collections::BTreeMap;

use super::super::words::WordSet;

/// A write that is under way.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct UnderWay {
    pub words: WordSet,
    /// The server process that has it.
    pub pid: i32,
    /// It may change the schema.
    pub schema: bool,
}

/// Somebody who is told, over a connection of type `L`; connections are equal if they are the same one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer<L> {
    pub id: u64,
    pub link: L,
    /// The epoch with which it joined, as it was when this member attached to it.
    joined: u64,
    /// It has said that it heard who attached.
    heard: bool,
}

/// Own writes by token, and who is told.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Told<L> {
    writes: BTreeMap<u64, UnderWay>,
    /// Was there ever one?
    begun: bool,
    peers: Vec<Peer<L>>,
}

impl<L> Default for Told<L> {
    fn default() -> Self {
        Told { writes: BTreeMap::new(), begun: false, peers: Vec::new() }
    }
}

impl<L: PartialEq> Told<L> {
    pub fn begin(&mut self, token: u64, write: UnderWay) {
        self.writes.insert(token, write);
        self.begun = true;
    }

    pub fn end(&mut self, token: u64) {
        self.writes.remove(&token);
    }

    pub fn writes(&self) -> &BTreeMap<u64, UnderWay> {
        &self.writes
    }

    pub fn has_written(&self) -> bool {
        self.begun
    }

    pub fn peers(&self) -> &[Peer<L>] {
        &self.peers
    }

    pub fn peer(&self, id: u64) -> Option<&Peer<L>> {
        self.peers.iter().find(|peer| peer.id == id)
    }

    /// Member `id` is there under epoch `joined`: if that is a new joining, it has served nothing since the last one ended.
    pub fn meet(&mut self, id: u64, joined: u64) {
        self.peers.retain(|peer| peer.id != id || peer.joined == joined);
    }

    /// It is told of every write from now on. What is under way is to be passed on before the lock is released.
    pub fn attach(&mut self, id: u64, joined: u64, link: L) {
        self.peers.retain(|peer| peer.id != id);
        self.peers.push(Peer { id, link, joined, heard: false });
    }

    /// Its answer to that: has it heard?
    pub fn attached(&mut self, id: u64, link: &L, heard: bool) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id && peer.link == *link) {
            peer.heard = heard;
        }
    }

    /// Is it told over a connection that works, for that joining of its?
    pub fn tells(&self, id: u64, joined: u64, is_up: impl Fn(&L) -> bool) -> bool {
        self.peer(id).is_some_and(|peer| peer.joined == joined && peer.is_told(is_up))
    }

    /// Nobody else is told any more: they serve nothing. Was anybody?
    pub fn tell_only(&mut self, ids: impl Fn(u64) -> bool) -> bool {
        let before = self.peers.len();
        self.peers.retain(|peer| ids(peer.id));
        self.peers.len() != before
    }
}

impl<L> Peer<L> {
    pub fn is_told(&self, is_up: impl Fn(&L) -> bool) -> bool {
        self.heard && is_up(&self.link)
    }
}
