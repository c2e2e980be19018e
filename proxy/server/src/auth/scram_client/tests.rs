//! Both sides in memory, so that each is checked by code that is not its own: weir's client drives postgres-protocol's
//! SCRAM, weir's server pgwire's.

use weir_core::error::Severity;

use super::*;
use crate::auth::scram_server::{MECHANISM, ScramServer};
use crate::auth::secret::{MockKey, Secret};

const KEY: MockKey = MockKey([9; 32]);

/// The keys of RFC 7677 §3: password `pencil`, its salt, 4096 rounds.
const RFC_7677: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

/// As a PostgreSQL 15 wrote it into pg_authid after CREATE USER … PASSWORD 'pencil'.
const FROM_A_SERVER: &str = "SCRAM-SHA-256$4096:BIikq4GAedxWQVsUWYfNVQ==$m0idvKpzzkzDsbPsynlWQotOblzR0Ne0vC4Xt9/H52A=:vzC1Z+NGlWnXLrNJF+PLHDMEzn1MXAB53+omXQNb8Tg=";

/// Known users and their secrets, unknown ones and their mocks.
fn secret(user: &str) -> Secret {
    let secret = match user {
        "plain" => Secret::derive("pencil"),
        "prepped" => Secret::derive("a\u{a0}b\u{2168}"),
        "verified" => Secret::parse(RFC_7677),
        "migrated" => Secret::parse(FROM_A_SERVER),
        _ => Some(Secret::mock(KEY, user)),
    };
    secret.expect("valid")
}

fn request(code: i32, data: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes(), data].concat()
}

fn body(message: &[u8]) -> &[u8] {
    assert_eq!(message[0], b'p');
    assert_eq!(u32::from_be_bytes([message[1], message[2], message[3], message[4]]) as usize, message.len() - 1);
    &message[5..]
}

/// A whole login; the first error of either side.
fn login(user: &str, password: &str) -> Result<(), UserError> {
    let mut server = ScramServer::new(user, secret(user));
    let mut client = ClientAuth::new(user, Some(password));
    let first = client.respond(&request(10, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"))?.expect("an answer");
    let challenge = server.on_first(body(&first))?;
    let last = client.respond(&request(11, &challenge))?.expect("an answer");
    let proof = server.on_final(body(&last))?;
    assert_eq!(client.respond(&request(12, &proof))?, None);
    assert!(!client.is_done());
    assert_eq!(client.respond(&request(0, b""))?, None);
    assert!(client.is_done());
    Ok(())
}

#[test]
fn the_right_password_gets_in() {
    for (user, password) in [("plain", "pencil"), ("verified", "pencil"), ("migrated", "pencil"), ("prepped", "a bIX")]
    {
        assert_eq!(login(user, password), Ok(()), "{user}");
    }
}

#[test]
fn a_wrong_password_and_an_unknown_user_look_the_same() {
    for user in ["plain", "verified", "nobody"] {
        let error = login(user, "pencils").expect_err("refused");
        let expected = UserError::new(
            Blame::Client,
            sqlstate::INVALID_PASSWORD,
            format!("password authentication failed for user \"{user}\""),
        );
        assert_eq!(error, expected.fatal());
    }
    let challenge = |user: &str| {
        let first = ClientAuth::new(user, Some("x")).respond(&request(10, b"SCRAM-SHA-256\0\0"));
        let first = first.expect("valid").expect("an answer");
        let challenge = ScramServer::new(user, secret(user)).on_first(body(&first)).expect("a challenge");
        let challenge = String::from_utf8(challenge).expect("text");
        challenge.split_once(",s=").expect("a salt").1.to_owned()
    };
    assert_eq!(challenge("nobody"), challenge("nobody"), "the salt of an unknown user is stable");
    assert_eq!(challenge("nobody").len(), challenge("plain").len());
    assert_ne!(challenge("nobody"), challenge("no one"));
}

fn initial(mechanism: &str, message: &[u8]) -> Vec<u8> {
    [mechanism.as_bytes(), b"\0", &(message.len() as u32).to_be_bytes(), message].concat()
}

#[test]
fn malformed_first_messages_are_refused() {
    let good = initial(MECHANISM, b"n,,n=,r=abc");
    let fresh = || ScramServer::new("plain", secret("plain"));
    assert!(fresh().on_first(&good).is_ok());
    assert!(fresh().on_first(&initial(MECHANISM, b"y,,n=,r=abc")).is_ok());
    for length in 0..good.len() {
        assert!(fresh().on_first(&good[..length]).is_err(), "{length} bytes");
    }
    let no_response = [MECHANISM.as_bytes(), b"\0", &(-1_i32).to_be_bytes()].concat();
    let long = [&b"n,,n=,r="[..], &[b'a'; 1100]].concat();
    let bodies = [
        initial("SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,,n=,r=abc"),
        initial("SCRAM-SHA-1", b"n,,n=,r=abc"),
        initial(MECHANISM, b"p=tls-server-end-point,,n=,r=abc"),
        initial(MECHANISM, b"n,a=x,n=,r=abc"),
        initial(MECHANISM, b"n,,m=x,n=,r=abc"),
        initial(MECHANISM, b"n,,n=,r="),
        initial(MECHANISM, b"n,,n=,r=a\x7fc"),
        initial(MECHANISM, b"n,,n=,r=a\0c"),
        initial(MECHANISM, b"n,,n=,r=\xff"),
        initial(MECHANISM, b"x,,n=,r=abc"),
        initial(MECHANISM, b""),
        initial(MECHANISM, &long),
        [good.as_slice(), b"x"].concat(),
        no_response,
    ];
    for body in bodies {
        let error = fresh().on_first(&body).expect_err(&String::from_utf8_lossy(&body));
        assert_eq!((error.sqlstate, error.severity), (sqlstate::PROTOCOL_VIOLATION, Severity::Fatal));
    }
}

#[test]
fn an_exchange_cannot_be_bent() {
    let start = || {
        let mut server = ScramServer::new("plain", secret("plain"));
        let mut client = ClientAuth::new("plain", Some("pencil"));
        let first = client.respond(&request(10, b"SCRAM-SHA-256\0\0")).expect("valid").expect("an answer");
        let challenge = server.on_first(body(&first)).expect("a challenge");
        let last = client.respond(&request(11, &challenge)).expect("valid").expect("an answer");
        (server, body(&first).to_vec(), body(&last).to_vec())
    };
    let (_, _, last) = start();
    for length in 0..last.len() {
        let (mut server, _, last) = start();
        assert!(server.on_final(&last[..length]).is_err(), "{length} bytes");
        assert!(server.on_final(&last).is_err(), "no second try");
    }
    for at in 0..last.len() {
        let (mut server, _, mut last) = start();
        last[at] ^= 1;
        assert!(server.on_final(&last).is_err(), "byte {at}");
    }
    let (mut server, _, _) = start();
    assert!(server.on_final(&last).is_err(), "another exchange's proof");
    let (mut server, first, _) = start();
    assert!(server.on_first(&first).is_err(), "a second initial response");
    assert!(ScramServer::new("plain", secret("plain")).on_final(&last).is_err(), "no challenge yet");
}

#[test]
fn other_methods_are_answered_as_asked() {
    let client = || ClientAuth::new("md5_user", Some("password"));
    assert_eq!(client().respond(&request(3, b"")), Ok(Some(b"p\0\0\0\x0dpassword\0".to_vec())));
    let hashed = client().respond(&request(5, &[0x2a, 0x3d, 0x8f, 0xe0])).expect("valid").expect("an answer");
    assert_eq!(body(&hashed), b"md562af4dd09bbb41884907a838a3233294\0");
    let mut trusted = ClientAuth::new("x", None);
    assert_eq!(trusted.respond(&request(0, b"")), Ok(None));
    assert!(trusted.is_done());
}

#[test]
fn a_server_that_cheats_is_refused() {
    let started = || {
        let mut client = ClientAuth::new("x", Some("pencil"));
        client.respond(&request(10, b"SCRAM-SHA-256\0\0")).expect("valid").expect("an answer");
        client
    };
    let refusals = [
        ("no proof", started().respond(&request(0, b""))),
        ("a lesser method", started().respond(&request(3, b""))),
        ("a nonce of its own", started().respond(&request(11, b"r=abc,s=AAAA,i=4096"))),
        ("too much work", started().respond(&request(11, b"r=abc,s=AAAA,i=4294967295"))),
        ("an early end", started().respond(&request(12, b"v=AAAA"))),
        ("twice", started().respond(&request(10, b"SCRAM-SHA-256\0\0"))),
        ("only PLUS", ClientAuth::new("x", Some("y")).respond(&request(10, b"SCRAM-SHA-256-PLUS\0\0"))),
        ("no password", ClientAuth::new("x", None).respond(&request(10, b"SCRAM-SHA-256\0\0"))),
        ("GSS", ClientAuth::new("x", Some("y")).respond(&request(7, b""))),
        ("short salt", ClientAuth::new("x", Some("y")).respond(&request(5, b"abc"))),
        ("cut short", ClientAuth::new("x", Some("y")).respond(&[0, 0])),
    ];
    for (what, answer) in refusals {
        let error = answer.expect_err(what);
        assert_eq!((error.sqlstate, error.blame), (sqlstate::CANNOT_CONNECT, Blame::Server), "{what}");
    }
    let mut failed = started();
    assert!(failed.respond(&request(11, b"bad")).is_err());
    assert!(failed.respond(&request(11, b"bad")).is_err());
}
