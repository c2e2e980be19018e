//! What a client sends before it has a tag, and the settings it brings: no panic, and what parses is written back the same.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use weir::front::replication::Mode;
use weir_core::session::startup::startup_vars;
use weir_wire::startup::{Request, parse, put_cancel, put_startup_minor, size};

fuzz_target!(|input: &[u8]| {
    let _ = size(input);
    match parse(input) {
        Ok(Request::Startup(startup)) => {
            let pairs: Vec<(String, String)> = startup
                .parameters
                .iter()
                .map(|(name, value)| (text(name), text(value)))
                .collect();
            let _ = startup_vars(pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())));
            let _ = Mode::read(startup.get("replication").map(text).as_deref());
            let valid = startup.parameters.iter().all(|(name, value)| is_text(name) && is_text(value));
            if valid {
                let mut out = BytesMut::new();
                put_startup_minor(&mut out, startup.minor, &pairs);
                assert_eq!(parse(&out), Ok(Request::Startup(startup)));
            }
        }
        Ok(Request::Cancel { process, secret }) => {
            let mut out = BytesMut::new();
            put_cancel(&mut out, process, secret);
            assert_eq!(&out[..], input);
        }
        _ => {}
    }
});

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn is_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok()
}
