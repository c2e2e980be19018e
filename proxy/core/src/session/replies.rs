//! The replies one Backend still owes: the only place that knows which frame answers which message.
//!
//! Invariant: frames reach the client in the order of its messages, every message is answered exactly once, and a frame
//! that does not fit what is owed is a [`Desync`], after which the Backend must be closed. Messages that weir added
//! for itself are owed like any other, but their replies are swallowed.

use smallvec::SmallVec;
use weir_wire::backend::{Status, tag};

/// One thing owed, in message order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owed {
    /// ParseComplete. `op` names the change that an error undoes.
    Parse {
        hidden: bool,
        op: u32,
    },
    BindComplete {
        hidden: bool,
    },
    /// CloseComplete. `op` as above.
    Close {
        hidden: bool,
        op: u32,
    },
    /// ParameterDescription (statements only), then RowDescription or NoData.
    Describe,
    /// The same, of a statement: what its columns are is to be remembered.
    DescribeStatement,
    /// Rows, a COPY, or nothing, then CommandComplete, EmptyQueryResponse or PortalSuspended.
    Execute,
    /// ReadyForQuery that ends a pipeline. An error before it (of a deferred constraint) is the client's, hidden or not.
    Sync {
        hidden: bool,
    },
    /// Everything up to and including ReadyForQuery of a simple query or function call.
    Query {
        hidden: bool,
    },
    /// Bytes weir itself owes the client at this place. `op` as above.
    Own {
        bytes: &'static [u8],
        op: u32,
    },
}

/// What to do with a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Forward,
    /// RowDescription or NoData of a statement: forward it, and remember it.
    Described,
    Swallow,
    /// ReadyForQuery.
    Ready {
        status: Status,
        hidden: bool,
    },
    /// ErrorResponse: forward it; the listed ops never happened.
    Failed {
        undone: SmallVec<[u32; 8]>,
    },
    /// ErrorResponse to a message of weir's own.
    HiddenFailed,
    /// CopyInResponse: forward it, then pass the client's copy messages on until the server ends the copy.
    CopyIn,
}

/// The Backend sent something that nobody asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("server sent '{}' which answers nothing", char::from(*.0))]
pub struct Desync(pub u8);

#[derive(Debug, Default)]
pub struct Replies {
    queue: Queue,
    copying_in: bool,
}

/// First in, first out; what one statement owes needs no allocation.
#[derive(Debug, Default)]
struct Queue {
    owed: SmallVec<[Owed; 8]>,
    /// How many at the front have been answered.
    answered: usize,
}

impl Queue {
    /// Answered ones are kept until they are this many and the greater part.
    const ANSWERED_MAX: usize = 64;

    fn push(&mut self, owed: Owed) {
        self.owed.push(owed);
    }

    fn front(&self) -> Option<&Owed> {
        self.owed.get(self.answered)
    }

    fn is_empty(&self) -> bool {
        self.answered == self.owed.len()
    }

    fn pop(&mut self) {
        self.answered += 1;
        if self.is_empty() {
            self.owed.clear();
            self.answered = 0;
        } else if self.answered > Self::ANSWERED_MAX && self.answered > self.owed.len() / 2 {
            self.owed.drain(..self.answered);
            self.answered = 0;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Owed> {
        self.owed[self.answered..].iter()
    }

    fn retain(&mut self, keep: impl Fn(&Owed) -> bool) {
        self.owed.drain(..self.answered);
        self.answered = 0;
        self.owed.retain(|owed| keep(owed));
    }
}

impl Replies {
    pub fn push(&mut self, owed: Owed) {
        self.queue.push(owed);
    }

    /// Nothing is owed any more.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The server has asked for COPY data and has not ended the copy.
    pub fn copying_in(&self) -> bool {
        self.copying_in
    }

    /// A ReadyForQuery is still to come.
    pub fn owes_ready(&self) -> bool {
        self.queue.iter().any(|owed| matches!(owed, Owed::Sync { .. } | Owed::Query { .. }))
    }

    /// The client has ended its copy data; what it sends next is no longer part of the copy.
    pub fn copy_ended(&mut self) {
        self.copying_in = false;
    }

    /// Weir's own bytes that are due now; call after every push and every frame until `None`.
    pub fn own_due(&mut self) -> Option<&'static [u8]> {
        let Some(Owed::Own { bytes, .. }) = self.queue.front() else { return None };
        let bytes = *bytes;
        self.queue.pop();
        Some(bytes)
    }

    /// Judges a frame by its tag; `body` is only looked at for ReadyForQuery.
    pub fn on_frame(&mut self, tag: u8, body: &[u8]) -> Result<Verdict, Desync> {
        match tag {
            tag::NOTICE | tag::PARAMETER_STATUS => return Ok(self.unless_hidden()),
            tag::NOTIFICATION => return Ok(Verdict::Forward),
            _ => {}
        }
        let Some(head) = self.queue.front() else { return Err(Desync(tag)) };
        match (head, tag) {
            (Owed::Own { .. }, _) => Err(Desync(tag)),
            (Owed::Query { hidden: true }, tag::ERROR) => Ok(Verdict::HiddenFailed),
            (Owed::Query { .. }, tag::ERROR) => {
                self.copying_in = false;
                Ok(Verdict::Failed { undone: SmallVec::new() })
            }
            (_, tag::ERROR) => Ok(self.fail()),
            (Owed::Sync { hidden } | Owed::Query { hidden }, tag::READY) => {
                let hidden = *hidden;
                let status = Status::read(body).map_err(|_| Desync(tag))?;
                self.copying_in = false;
                self.queue.pop();
                Ok(Verdict::Ready { status, hidden })
            }
            (Owed::Query { .. } | Owed::Execute, tag::COPY_IN | tag::COPY_BOTH) => {
                self.copying_in = true;
                // During a copy the server ignores Sync (src/backend/commands/copyfromparse.c), so it never answers those
                // that were sent along with the Execute.
                if matches!(head, Owed::Execute) {
                    self.drop_ignored_syncs();
                }
                Ok(Verdict::CopyIn)
            }
            (Owed::Query { hidden }, _) => {
                let hidden = *hidden;
                if tag == tag::COMMAND_COMPLETE {
                    self.copying_in = false;
                }
                if hidden { Ok(Verdict::Swallow) } else { Ok(Verdict::Forward) }
            }
            (Owed::Parse { hidden, .. }, tag::PARSE_COMPLETE)
            | (Owed::BindComplete { hidden }, tag::BIND_COMPLETE)
            | (Owed::Close { hidden, .. }, tag::CLOSE_COMPLETE) => {
                let hidden = *hidden;
                self.queue.pop();
                Ok(if hidden { Verdict::Swallow } else { Verdict::Forward })
            }
            (Owed::Describe | Owed::DescribeStatement, tag::PARAMETER_DESCRIPTION)
            | (Owed::Execute, tag::DATA_ROW | tag::COPY_OUT | tag::COPY_DATA | tag::COPY_DONE) => Ok(Verdict::Forward),
            (Owed::Describe, tag::ROW_DESCRIPTION | tag::NO_DATA) => {
                self.queue.pop();
                Ok(Verdict::Forward)
            }
            (Owed::DescribeStatement, tag::ROW_DESCRIPTION | tag::NO_DATA) => {
                self.queue.pop();
                Ok(Verdict::Described)
            }
            (Owed::Execute, tag::COMMAND_COMPLETE | tag::EMPTY_QUERY | tag::PORTAL_SUSPENDED) => {
                self.copying_in = false;
                self.queue.pop();
                Ok(Verdict::Forward)
            }
            _ => Err(Desync(tag)),
        }
    }

    fn unless_hidden(&self) -> Verdict {
        match self.queue.front() {
            Some(Owed::Query { hidden: true } | Owed::Sync { hidden: true } | Owed::Parse { hidden: true, .. }) => {
                Verdict::Swallow
            }
            _ => Verdict::Forward,
        }
    }

    /// After an error the server skips to the next Sync: what was owed until there will not come.
    fn fail(&mut self) -> Verdict {
        self.copying_in = false;
        let mut undone = SmallVec::new();
        while let Some(owed) = self.queue.front() {
            match owed {
                Owed::Sync { .. } | Owed::Query { .. } => break,
                Owed::Parse { op, .. } | Owed::Close { op, .. } | Owed::Own { op, .. } => undone.push(*op),
                _ => {}
            }
            self.queue.pop();
        }
        Verdict::Failed { undone }
    }

    fn drop_ignored_syncs(&mut self) {
        self.queue.retain(|owed| !matches!(owed, Owed::Sync { .. }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owed(list: &[Owed]) -> Replies {
        let mut replies = Replies::default();
        for owed in list {
            replies.push(owed.clone());
        }
        replies
    }

    #[test]
    fn a_pipeline_with_a_hidden_parse_is_answered_in_order() {
        let mut replies = owed(&[
            Owed::Own { bytes: b"1....", op: 0 },
            Owed::Parse { hidden: true, op: 0 },
            Owed::BindComplete { hidden: false },
            Owed::Describe,
            Owed::Execute,
            Owed::Sync { hidden: false },
        ]);
        assert_eq!(replies.own_due(), Some(&b"1...."[..]));
        assert_eq!(replies.own_due(), None);
        assert_eq!(replies.on_frame(b'1', b""), Ok(Verdict::Swallow));
        for tag in *b"2TDDC" {
            assert_eq!(replies.on_frame(tag, b""), Ok(Verdict::Forward), "{}", char::from(tag));
        }
        assert_eq!(replies.on_frame(b'Z', b"T"), Ok(Verdict::Ready { status: Status::InTransaction, hidden: false }));
        assert!(replies.is_empty());
        assert_eq!(replies.on_frame(b'Z', b"I"), Err(Desync(b'Z')));
    }

    #[test]
    fn an_error_skips_to_the_sync_and_undoes_what_followed() {
        let mut replies = owed(&[
            Owed::BindComplete { hidden: false },
            Owed::Execute,
            Owed::Parse { hidden: false, op: 7 },
            Owed::Own { bytes: b"x", op: 8 },
            Owed::Close { hidden: false, op: 9 },
            Owed::Sync { hidden: false },
            Owed::BindComplete { hidden: false },
        ]);
        let Ok(Verdict::Failed { undone }) = replies.on_frame(b'E', b"") else { panic!("not failed") };
        assert_eq!(undone.as_slice(), [7, 8, 9]);
        assert_eq!(replies.own_due(), None);
        assert!(matches!(replies.on_frame(b'Z', b"I"), Ok(Verdict::Ready { .. })));
        assert_eq!(replies.on_frame(b'2', b""), Ok(Verdict::Forward));
    }

    #[test]
    fn a_sync_sent_along_with_copy_in_is_not_answered() {
        let mut replies = owed(&[Owed::BindComplete { hidden: false }, Owed::Execute, Owed::Sync { hidden: false }]);
        assert_eq!(replies.on_frame(b'2', b""), Ok(Verdict::Forward));
        assert_eq!(replies.on_frame(b'G', b""), Ok(Verdict::CopyIn));
        assert!(replies.copying_in());
        assert_eq!(replies.on_frame(b'C', b""), Ok(Verdict::Forward));
        assert!(!replies.copying_in() && replies.is_empty());
        replies.push(Owed::Sync { hidden: false });
        assert!(matches!(replies.on_frame(b'Z', b"I"), Ok(Verdict::Ready { .. })));
    }

    #[test]
    fn notices_of_hidden_work_stay_hidden() {
        let mut replies = owed(&[Owed::Query { hidden: true }, Owed::Query { hidden: false }]);
        assert_eq!(replies.on_frame(b'N', b""), Ok(Verdict::Swallow));
        assert_eq!(replies.on_frame(b'C', b""), Ok(Verdict::Swallow));
        assert_eq!(replies.on_frame(b'Z', b"I"), Ok(Verdict::Ready { status: Status::Idle, hidden: true }));
        assert_eq!(replies.on_frame(b'N', b""), Ok(Verdict::Forward));
        assert_eq!(replies.on_frame(b'S', b""), Ok(Verdict::Forward));
    }

    proptest! {
        /// Whatever the server sends, nothing panics, and what is left owed is always a suffix of what was owed.
        #[test]
        fn any_frames_are_judged(tags in prop::collection::vec(prop::sample::select(b"123tTnDCIsZEGHcdNSA".to_vec()), 0..60)) {
            let list = [
                Owed::Parse { hidden: false, op: 1 }, Owed::BindComplete { hidden: false }, Owed::Describe, Owed::Execute, Owed::Sync { hidden: false },
                Owed::BindComplete { hidden: false }, Owed::Execute, Owed::Sync { hidden: false },
            ];
            let mut replies = owed(&list);
            for tag in tags {
                if replies.on_frame(tag, b"I").is_err() {
                    break;
                }
                if !replies.copying_in() && replies.queue.iter().filter(|owed| matches!(owed, Owed::Sync { .. })).count() == 2 {
                    let left: Vec<_> = replies.queue.iter().cloned().collect();
                    prop_assert!(list.ends_with(&left));
                }
            }
        }
    }
}
