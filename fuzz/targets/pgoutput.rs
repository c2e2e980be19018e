//! What a walsender sends, as any bytes: read or refused, and rows that are taken have as many values as they say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir_core::fresh::decoded::{Decoded, Known};
use weir_core::topology::TableRules;
use weir_core::topology::catalog::Catalog;
use weir_wire::pgoutput::{Copied, Message, read_copied, read_message};

fuzz_target!(|input: &[u8]| {
    let (catalog, rules) = (Catalog::default(), TableRules::default());
    let mut decoded = Decoded::default();
    // Messages with a length byte in front, as one stream.
    let mut rest = input;
    while let Some((&length, tail)) = rest.split_first() {
        let (body, tail) = tail.split_at(tail.len().min(usize::from(length)));
        rest = tail;
        let _ = read_copied(body).map(|copied| matches!(copied, Copied::Data { .. }));
        let Ok(message) = read_message(body, decoded.is_streamed()) else { return };
        if let Message::Insert { new, .. } = &message {
            assert_eq!(new.values().count(), new.len());
        }
        if decoded.on_message(&message, Known { catalog: &catalog, rules: &rules, version: 1 }).is_err() {
            return;
        }
    }
});
