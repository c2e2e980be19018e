//! SCRAM messages of hostile clients and servers, and verifiers: no panic, and nobody gets in without the proof.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::auth::scram_client::ClientAuth;
use weir::auth::scram_server::ScramServer;
use weir::auth::secret::Secret;

fuzz_target!(|input: &[u8]| {
    let (first, rest) = cut(input);
    let (second, third) = cut(rest);
    let verifier = "SCRAM-SHA-256$4096:c2FsdHNhbHRzYWx0c2FsdA==$E0qmKAoHW8wq0xxm3SLmqHqS9nUqvHO5pqBxLDYW0Tw=:8oGbTD0nnqmB4HS1RpE2ovRsiLT0Ky0zvBtWdRhhvzs=";
    if let Some(secret) = Secret::parse(verifier) {
        let mut server = ScramServer::new("user", secret);
        if server.on_first(first).is_ok() {
            assert!(server.on_final(second).is_err(), "let in without a proof");
        }
    }
    let _ = Secret::parse(&String::from_utf8_lossy(input));
    let mut client = ClientAuth::new("user", Some("password"));
    for body in [first, second, third] {
        if client.respond(body).is_err() {
            break;
        }
    }
});

/// Two parts, by a length in front.
fn cut(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((&length, rest)) = input.split_first() else { return (input, input) };
    rest.split_at(rest.len().min(usize::from(length)))
}
