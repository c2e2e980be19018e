//! Push: writes are told to others without waiting for their answers, and what bounds how late they are heard of.
//!
//! Invariant: a member that serves has heard of everything that others had announced one lease ago. It asks each of them again and
//! again; the answer comes on the connection on which that one announces, behind all that was announced before, and names the
//! moment of the question on the asker's own clock. So no clock is compared with another machine's, and messages that were lost
//! take the answers behind them along. A connection that is made anew does not say what the old one has lost: then
//! everything that was read before is void.
//!
//! Whoever cannot be heard is counted on until it is put out, its lease is over and none of its server processes is at work any
//! more, because what it wrote last may not have been announced to anybody who lives.
//!
//! Writes that may change the schema are waited for in this mode too: else others would announce their own writes by what was true before.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use weir_core::fresh::fleet::Heard;
use weir_core::fresh::fleet::told::Peer;
use weir_wire::peer::{Message, Write};

use super::super::link::Link;
use super::{Foreign, Member, now_us};
use crate::clock::Clock;
use crate::config::PeersMode;

impl Member {
    /// Do proxies tell each other without waiting?
    pub(in crate::fleet) fn pushes(&self) -> bool {
        self.fleet.as_ref().is_some_and(|fleet| fleet.mode == PeersMode::Push)
    }

    /// Need nobody wait until others have heard of a write that may change the schema, or not?
    pub(super) fn is_pushed(&self, schema: bool) -> bool {
        self.pushes() && !schema
    }

    /// Call it under the lock of what is under way, so that answers to questions go behind it.
    pub(super) fn push(&self, peer: &Peer<Arc<Link>>, write: Write) {
        peer.link.send(Message::Announce { from: self.id, to: peer.id, write });
    }

    /// Asks all who are told to say something on the connection on which they announce.
    pub(in crate::fleet) fn ping(&self) {
        let at_us = now_us();
        for peer in self.told.lock().peers() {
            peer.link.send(Message::Ping { from: self.id, to: peer.id, at_us });
        }
    }

    /// `from` asks, and is answered behind all that was announced to it.
    pub(in crate::fleet) fn answer_ping(&self, from: u64, at_us: u64) {
        let told = self.told.lock();
        if let Some(peer) = told.peer(from) {
            peer.link.send(Message::Pong { from: self.id, to: from, at_us });
        }
    }

    /// `from` has answered on `connection` what it was asked at `at_us`.
    pub(in crate::fleet) fn hear_pong(&self, from: u64, at_us: u64, connection: u64) {
        let mut heard = self.heard.lock();
        heard.answer((from, connection), at_us);
        self.reckon(&heard);
    }

    /// When was the question asked that `member` answered last?
    pub(in crate::fleet) fn heard_until_us(&self, member: u64) -> u64 {
        self.heard.lock().until_us(member)
    }

    /// Serves from now on as long as all of `ids` are heard. What was read before is void if somebody is not among them any more:
    /// its last writes may have been announced to nobody.
    pub(in crate::fleet) fn count_on(&self, ids: BTreeSet<u64>, clock: &Clock) {
        let mut heard = self.heard.lock();
        if !heard.count_on(ids) {
            clock.begin_anew();
        }
        self.reckon(&heard);
    }

    fn reckon(&self, heard: &Heard<Foreign>) {
        let Some(fleet) = &self.fleet else { return };
        self.hears_until_us.store(heard.hears_until_us(fleet.lease.as_micros() as u64), SeqCst);
    }

    /// May this proxy's row go when it leaves? Not while a write is under way that others may not have heard of.
    pub(in crate::fleet) fn is_through(&self) -> bool {
        !self.pushes() || self.told.lock().writes().is_empty()
    }
}
