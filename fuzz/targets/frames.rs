//! The frame splitter and the readers of every message, on any bytes in any portions: no panic, no lost byte, and the same
//! requests however the stream is cut.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use weir::front::batch::{Collector, Request};
use weir_wire::{backend, frame, row};

const MESSAGE_BYTES_MAX: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let whole = requests(input, input.len().max(1));
    let portion = usize::from(input.first().copied().unwrap_or_default()) % 17 + 1;
    assert_eq!(whole, requests(input, portion), "the requests depend on how the stream is cut");

    let mut rest = input;
    while let Ok(Some(frame)) = frame::peek(rest, MESSAGE_BYTES_MAX) {
        let _ = row::fields(frame.body);
        let _ = row::values(frame.body);
        let _ = backend::read_parameter_status(frame.body);
        let _ = backend::report_field(frame.body, b'M');
        let _ = backend::command_rows(backend::command_tag(frame.body));
        let _ = backend::Status::read(frame.body);
        rest = &rest[frame.raw.len()..];
    }
});

/// What a session would be asked, as text.
fn requests(input: &[u8], portion: usize) -> Vec<String> {
    let mut collector = Collector::new(MESSAGE_BYTES_MAX);
    let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
    for part in input.chunks(portion) {
        buffer.extend_from_slice(part);
        loop {
            match collector.next(&mut buffer) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let over = matches!(request, Request::Terminate);
                    seen.push(format!("{request:?}"));
                    if over {
                        return seen;
                    }
                }
                Err(unusable) => {
                    seen.push(format!("{unusable:?}"));
                    return seen;
                }
            }
        }
    }
    seen
}
