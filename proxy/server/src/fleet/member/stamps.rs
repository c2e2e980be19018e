//! Stamps that members take over from each other, so that what one has stored in Redis the others can use.
//!
//! Invariant: only between members that both serve, and so hear of all writes: a word that is settled there, and has not moved here
//! while the question was on its way, has seen the same writes.

use std::sync::Arc;

use tokio::time::timeout;
use weir_wire::peer::Message;

use super::super::link::Answer;
use super::{HEAR_MAX, Member};

impl Member {
    /// Of words from `first` on, for another proxy. Empty: this one does not serve.
    pub(in crate::fleet) fn stamps(&self, first: u16, count: u16) -> Vec<u64> {
        let stamps = self.words.settled_stamps(first, count);
        if !self.may_serve() {
            return Vec::new();
        }
        stamps.into_iter().map(|settled| settled.map_or(0, |(_, stamp)| stamp)).collect()
    }

    /// Takes over the stamps of the member with the lowest number, so that what others have stored in Redis can be used here.
    /// False: there is none to ask, or it did not answer.
    pub(in crate::fleet) async fn take_stamps(&self, first: u16, count: u16) -> bool {
        let Some(fleet) = self.fleet.as_ref().filter(|_| self.may_serve()) else { return false };
        let lowest = self.others.lock().iter().filter(|(_, _, out)| !out).map(|(id, _, _)| *id).min();
        let Some(leader) = lowest.filter(|lowest| *lowest < self.id) else { return false };
        let link = self.told.lock().peers.iter().find(|peer| peer.id == leader).map(|peer| Arc::clone(&peer.link));
        let Some(link) = link else { return false };
        let (mine, token) = (self.words.settled_stamps(first, count), fleet.token());
        let Ok(answer) = link.ask(Message::AskStamps { to: leader, token, first, count }, leader, token) else {
            return false;
        };
        let Ok(Ok(Answer::Stamps(theirs))) = timeout(HEAR_MAX, answer).await else { return false };
        // Both hear of all writes: a word that has not moved here and is settled there has seen the same.
        if !self.may_serve() || theirs.len() != mine.len() {
            return false;
        }
        for (step, (mine, theirs)) in mine.into_iter().zip(theirs).enumerate() {
            if let Some(mine) = mine.filter(|mine| theirs != 0 && mine.1 != theirs) {
                self.words.take_stamp(first.wrapping_add(step as u16), mine, theirs);
            }
        }
        true
    }
}
