//! Who sent a notification, in terms clients know.
//!
//! A notification carries the process number of the server connection it came through, but a client knows sessions by the
//! number weir gave them at login. So a session that is about to notify leaves its number here, and listeners find it.
//! Non-goal: notifications that no text shows (sent by triggers or functions); they keep the server's number.

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::front::session::Session;
use crate::statements::Shape;

/// Server connections remembered; dead ones are only forgotten by starting anew.
const CONNECTIONS_MAX: usize = 16_384;

/// By the server's process number: the session that used the connection to notify last.
#[derive(Debug, Default)]
pub struct Notifiers(Mutex<HashMap<i32, i32>>);

impl Notifiers {
    pub fn note(&self, server_process: i32, session: i32) {
        let mut sessions = self.0.lock();
        if sessions.len() >= CONNECTIONS_MAX {
            sessions.clear();
        }
        sessions.insert(server_process, session);
    }

    /// Puts the sender as clients know it into the body of a NotificationResponse.
    pub fn name_sender(&self, notification: &mut [u8]) {
        if let Some(process) = notification.first_chunk_mut() {
            *process = self.sender(i32::from_be_bytes(*process)).to_be_bytes();
        }
    }

    /// The sender's number as its client knows it.
    fn sender(&self, server_process: i32) -> i32 {
        self.0.lock().get(&server_process).copied().unwrap_or(server_process)
    }
}

impl Session {
    /// Before a statement is sent: if it notifies, listeners will want to know who did.
    pub fn note_notifier(&self, index: usize, shape: &Shape) {
        if shape.effects.notifies {
            self.db.notifiers.note(self.held[index].lease.cancel_key.process, self.cancel.process);
        }
    }
}
