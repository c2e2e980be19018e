//! Stamps that members take over from each other, so that what one has stored in Redis the others can use.
//!
//! Invariant: only between members that both serve, and so hear of all writes: a word that is settled there, and has not moved here
//! while the question was on its way, has seen the same writes.

use std::sync::Arc;

use tokio::time::timeout;
use weir_core::fresh::fleet::{borrow, lend, lender};
use weir_wire::peer::Message;

use super::super::link::Answer;
use super::{HEAR_MAX, Member};

impl Member {
    /// Of words from `first` on, for another proxy. Empty: this one does not serve.
    pub(in crate::fleet) fn stamps(&self, first: u16, count: u16) -> Vec<u64> {
        let stamps = lend(&self.words, first, count);
        if self.may_serve() { stamps } else { Vec::new() }
    }

    /// Takes over the stamps of the member with the lowest number, so that what others have stored in Redis can be used here.
    /// False: there is none to ask, or it did not answer.
    pub(in crate::fleet) async fn take_stamps(&self, first: u16, count: u16) -> bool {
        let Some(fleet) = self.fleet.as_ref().filter(|_| self.may_serve()) else { return false };
        let leader = lender(self.id, self.others.lock().iter().map(|(id, _, out)| (*id, *out)));
        let Some(leader) = leader else { return false };
        let link = self.told.lock().peer(leader).map(|peer| Arc::clone(&peer.link));
        let Some(link) = link else { return false };
        let (mine, token) = (self.words.settled_stamps(first, count), fleet.token());
        let Ok(answer) = link.ask(Message::AskStamps { to: leader, token, first, count }, leader, token) else {
            return false;
        };
        let Ok(Ok(Answer::Stamps(theirs))) = timeout(HEAR_MAX, answer).await else { return false };
        if !self.may_serve() || theirs.len() != mine.len() {
            return false;
        }
        borrow(&self.words, first, &mine, &theirs);
        true
    }
}
