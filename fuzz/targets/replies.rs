//! The account of what a server owes, on any frames: it ends in a refusal or with nothing owed, and never in a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir_core::session::replies::{Owed, Replies};

fuzz_target!(|input: &[u8]| {
    let Some((&count, rest)) = input.split_first() else { return };
    let (messages, frames) = rest.split_at(rest.len().min(usize::from(count) % 32));
    let mut replies = Replies::default();
    for (op, message) in messages.iter().enumerate() {
        let (hidden, op) = (message & 0x80 != 0, op as u32);
        replies.push(match message % 8 {
            0 => Owed::Parse { hidden, op },
            1 => Owed::BindComplete { hidden },
            2 => Owed::Close { hidden, op },
            3 => Owed::Describe,
            4 => Owed::Execute,
            5 => Owed::Sync { hidden },
            6 => Owed::Query { hidden },
            _ => Owed::Own { bytes: b"own", op },
        });
    }
    for frame in frames {
        while replies.own_due().is_some() {}
        if replies.on_frame(*frame, b"I").is_err() {
            return;
        }
    }
});
