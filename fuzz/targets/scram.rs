//! SCRAM messages of hostile clients and servers, and verifiers: no panic, and nobody gets in without the proof.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use weir::auth::credential::Credential;
use weir::auth::scram_client::{Channel, ClientAuth};
use weir::auth::scram_server::{Expected, ScramServer};
use weir::auth::secret::{Stored, Verifier};

fuzz_target!(|input: &[u8]| {
    let (first, rest) = cut(input);
    let (second, third) = cut(rest);
    for certificate in [None, Some(std::sync::Arc::from([7; 32]))] {
        let verifier = Verifier { salt: vec![1; 16], iterations: 4096, stored_key: [2; 32], server_key: [3; 32] };
        let mut server = ScramServer::new("user", Expected { verifier, known: true }, certificate);
        if server.on_first(first).is_ok() {
            assert!(server.on_final(second).is_err(), "let in without a proof");
        }
        assert!(server.on_final(second).is_err(), "let in after a failure");
    }
    let _ = Stored::parse(&String::from_utf8_lossy(input));
    for channel in [Channel::Plain, Channel::Tls(Some(vec![7; 32]))] {
        let mut client = ClientAuth::new("user", Arc::new(Credential::password("password")), channel);
        for body in [first, second, third] {
            if client.respond(body).is_err() {
                break;
            }
        }
    }
});

/// Two parts, by a length in front.
fn cut(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((&length, rest)) = input.split_first() else { return (input, input) };
    rest.split_at(rest.len().min(usize::from(length)))
}
