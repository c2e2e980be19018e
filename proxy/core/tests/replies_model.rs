//! The account of what a server owes, against a model of a server: whatever a client and weir send and wherever the server
//! fails, the client gets exactly what one Postgres would have sent it, in order, and what never happened is named.
//!
//! An answer that is lost or doubled is noticed at the latest when the pipeline should have ended.

use proptest::prelude::*;
use weir_core::session::replies::{Owed, Replies, Verdict};
use weir_wire::backend::Status;

/// One message to the server, or a place where weir answers itself.
#[derive(Clone, Copy, Debug)]
enum Message {
    Parse {
        hidden: bool,
    },
    Bind {
        hidden: bool,
    },
    Close {
        hidden: bool,
    },
    DescribeStatement,
    DescribePortal {
        rows: bool,
    },
    Execute {
        rows: u8,
        end: u8,
    },
    Own,
    /// Ends a pipeline: Sync, or a simple query where none is open.
    Sync {
        hidden: bool,
    },
    Query {
        rows: u8,
    },
}

#[derive(Clone, Copy, Debug)]
struct Step {
    message: Message,
    /// The server refuses it, if it comes to it.
    fails: bool,
    /// A notification comes just before its answer.
    notified: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let message = prop_oneof![
        3 => any::<bool>().prop_map(|hidden| Message::Parse { hidden }),
        3 => any::<bool>().prop_map(|hidden| Message::Bind { hidden }),
        2 => any::<bool>().prop_map(|hidden| Message::Close { hidden }),
        1 => Just(Message::DescribeStatement),
        1 => any::<bool>().prop_map(|rows| Message::DescribePortal { rows }),
        4 => (0..4_u8, prop::sample::select(b"CIs".to_vec())).prop_map(|(rows, end)| Message::Execute { rows, end }),
        2 => Just(Message::Own),
        3 => prop::bool::weighted(0.2).prop_map(|hidden| Message::Sync { hidden }),
        1 => (0..4_u8).prop_map(|rows| Message::Query { rows }),
    ];
    (message, prop::bool::weighted(0.15), prop::bool::weighted(0.1)).prop_map(|(message, fails, notified)| Step {
        message,
        fails,
        notified,
    })
}

/// What the server sends, what the client must see, and which ops never happened.
#[derive(Default, Debug)]
struct Model {
    frames: Vec<u8>,
    visible: Vec<u8>,
    undone: Vec<u32>,
}

impl Model {
    fn run(steps: &[Step]) -> (Replies, Model) {
        let (mut replies, mut model) = (Replies::default(), Model::default());
        let (mut skipping, mut open) = (false, false);
        for (op, step) in steps.iter().enumerate() {
            // A simple query inside a pipeline is never sent along with it: the session ends the pipeline first.
            if open && matches!(step.message, Message::Query { .. }) {
                continue;
            }
            let op = op as u32;
            let owed = step.message.owed(op);
            open = !matches!(owed, Owed::Sync { .. } | Owed::Query { .. });
            if step.notified && !matches!(owed, Owed::Own { .. }) && !skipping {
                model.send(b'A', false);
            }
            model.answer(*step, &owed, &mut skipping, op);
            replies.push(owed);
        }
        if open {
            replies.push(Owed::Sync { hidden: false });
            model.send(b'Z', false);
        }
        (replies, model)
    }

    fn send(&mut self, tag: u8, hidden: bool) {
        self.frames.push(tag);
        if !hidden {
            self.visible.push(tag);
        }
    }

    fn answer(&mut self, step: Step, owed: &Owed, skipping: &mut bool, op: u32) {
        let undoable = matches!(owed, Owed::Parse { .. } | Owed::Close { .. } | Owed::Own { .. });
        match (owed, step.message) {
            (Owed::Sync { hidden }, _) => {
                if step.fails && !*skipping {
                    // A deferred constraint, at the commit.
                    self.send(b'E', false);
                }
                *skipping = false;
                self.send(b'Z', *hidden);
            }
            (Owed::Query { .. }, Message::Query { rows }) => {
                let end = if step.fails { b'E' } else { b'C' };
                self.rows(rows, end);
                self.send(b'Z', false);
            }
            _ if *skipping => self.undone.extend(undoable.then_some(op)),
            (Owed::Own { .. }, _) => self.visible.push(b'o'),
            _ if step.fails => {
                self.send(b'E', false);
                *skipping = true;
                self.undone.extend(undoable.then_some(op));
            }
            (Owed::Parse { hidden, .. }, _) => self.send(b'1', *hidden),
            (Owed::BindComplete { hidden }, _) => self.send(b'2', *hidden),
            (Owed::Close { hidden, .. }, _) => self.send(b'3', *hidden),
            (_, Message::DescribePortal { rows }) => self.send(if rows { b'T' } else { b'n' }, false),
            (_, Message::Execute { rows, end }) => self.rows(rows, end),
            _ => {
                self.send(b't', false);
                self.send(b'n', false);
            }
        }
    }

    fn rows(&mut self, rows: u8, end: u8) {
        (0..rows).for_each(|_| self.send(b'D', false));
        self.send(end, false);
    }
}

impl Message {
    fn owed(self, op: u32) -> Owed {
        match self {
            Message::Parse { hidden } => Owed::Parse { hidden, op },
            Message::Bind { hidden } => Owed::BindComplete { hidden },
            Message::Close { hidden } => Owed::Close { hidden, op },
            Message::DescribeStatement | Message::DescribePortal { .. } => Owed::Describe,
            Message::Execute { .. } => Owed::Execute,
            Message::Own => Owed::Own { bytes: b"o", op },
            Message::Sync { hidden } => Owed::Sync { hidden },
            Message::Query { .. } => Owed::Query { hidden: false },
        }
    }
}

/// What the client sees and which ops are undone; `None`: a frame was refused, or something is still owed at the end.
fn judge(mut replies: Replies, frames: &[u8]) -> Option<(Vec<u8>, Vec<u32>)> {
    let (mut visible, mut undone) = (Vec::new(), Vec::new());
    for &tag in frames {
        while let Some(own) = replies.own_due() {
            visible.extend_from_slice(own);
        }
        match replies.on_frame(tag, b"I").ok()? {
            Verdict::Forward | Verdict::Described => visible.push(tag),
            Verdict::Swallow => {}
            Verdict::Ready { status, hidden } => {
                assert_eq!(status, Status::Idle);
                visible.extend((!hidden).then_some(tag));
            }
            Verdict::Failed { undone: ops } => {
                visible.push(tag);
                undone.extend(ops);
            }
            Verdict::HiddenFailed | Verdict::CopyIn => return None,
        }
    }
    while let Some(own) = replies.own_due() {
        visible.extend_from_slice(own);
    }
    replies.is_empty().then_some((visible, undone))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_client_sees_what_one_server_would_send(steps in prop::collection::vec(step(), 0..40)) {
        let (replies, model) = Model::run(&steps);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let Some((visible, undone)) = judge(replies, &model.frames) else {
            return Err(TestCaseError::fail(format!("refused, or still owing: {}", text(&model.frames))));
        };
        prop_assert_eq!(text(&visible), text(&model.visible));
        prop_assert_eq!(undone, model.undone);
    }

    /// Of what is counted: rows and notifications may come in any number, a simple query in any shape, and an error stands for
    /// all that it skips.
    #[test]
    fn a_lost_or_doubled_frame_is_noticed(
        steps in prop::collection::vec(step(), 1..30),
        at in any::<prop::sample::Index>(),
        double in any::<bool>(),
    ) {
        let counted = |step: &Step| !step.fails && !matches!(step.message, Message::Query { .. } | Message::DescribeStatement);
        let steps: Vec<Step> = steps.into_iter().filter(counted).collect();
        let (replies, model) = Model::run(&steps);
        let mut frames = model.frames.clone();
        let answers: Vec<usize> = (0..frames.len()).filter(|place| !b"DA".contains(&frames[*place])).collect();
        prop_assume!(!answers.is_empty());
        let place = answers[at.index(answers.len())];
        if double {
            frames.insert(place, frames[place]);
        } else {
            frames.remove(place);
        }
        prop_assert!(judge(replies, &frames).is_none(), "{:?} became {:?}", model.frames, frames);
    }
}
