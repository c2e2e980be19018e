//! Both sides in memory: with a password weir's client drives postgres-protocol's SCRAM, so that the server's side is
//! checked by code that is not its own; with keys it is checked by what those logins gave away.

use weir_core::error::Severity;

use super::*;
use crate::auth::scram_server::{Expected, Proven, ScramServer};
use crate::auth::secret::{Md5Hash, MockKey, Verifier};

const KEY: MockKey = MockKey([9; 32]);

/// The keys of RFC 7677 §3: password `pencil`, its salt, 4096 rounds.
const RFC_7677: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

/// As a PostgreSQL 15 wrote it into pg_authid after CREATE USER … PASSWORD 'pencil'.
const FROM_A_SERVER: &str = "SCRAM-SHA-256$4096:BIikq4GAedxWQVsUWYfNVQ==$m0idvKpzzkzDsbPsynlWQotOblzR0Ne0vC4Xt9/H52A=:vzC1Z+NGlWnXLrNJF+PLHDMEzn1MXAB53+omXQNb8Tg=";

/// Known users and their verifiers, unknown ones and their mocks.
fn expected(user: &str) -> Expected {
    let verifier = match user {
        "plain" => Verifier::derive("pencil"),
        "prepped" => Verifier::derive("a\u{a0}b\u{2168}"),
        "verified" => Verifier::parse(RFC_7677),
        "migrated" => Verifier::parse(FROM_A_SERVER),
        _ => return Expected { verifier: Verifier::mock(KEY, user), known: false },
    };
    Expected { verifier: verifier.expect("valid"), known: true }
}

/// A server's side without TLS.
fn server(user: &str) -> ScramServer {
    ScramServer::new(user, expected(user), None)
}

/// weir's side without TLS; the empty password is none.
fn client(user: &str, password: &str) -> ClientAuth {
    ClientAuth::new(user, Arc::new(Credential::password(password)), Channel::Plain)
}

/// The offer of a server, as AuthenticationSASL has it.
fn offer(server: &ScramServer) -> Vec<u8> {
    let mut names = Vec::new();
    for name in server.mechanisms() {
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    names.push(0);
    request(10, &names)
}

fn request(code: i32, data: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes(), data].concat()
}

fn body(message: &[u8]) -> &[u8] {
    assert_eq!(message[0], b'p');
    assert_eq!(u32::from_be_bytes([message[1], message[2], message[3], message[4]]) as usize, message.len() - 1);
    &message[5..]
}

/// A whole login; what the server learnt, or the first error of either side.
fn exchange(mut server: ScramServer, mut client: ClientAuth) -> Result<Proven, UserError> {
    let first = client.respond(&offer(&server))?.expect("an answer");
    let challenge = server.on_first(body(&first))?;
    let last = client.respond(&request(11, &challenge))?.expect("an answer");
    let proven = server.on_final(body(&last))?;
    assert_eq!(client.respond(&request(12, &proven.answer))?, None);
    assert!(!client.is_done());
    assert_eq!(client.respond(&request(0, b""))?, None);
    assert!(client.is_done());
    Ok(proven)
}

fn login(user: &str, password: &str) -> Result<Proven, UserError> {
    exchange(server(user), client(user, password))
}

#[test]
fn the_right_password_gets_in() {
    for (user, password) in [("plain", "pencil"), ("verified", "pencil"), ("migrated", "pencil"), ("prepped", "a bIX")]
    {
        login(user, password).expect(user);
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
        let first = client(user, "x").respond(&request(10, b"SCRAM-SHA-256\0\0"));
        let first = first.expect("valid").expect("an answer");
        let challenge = server(user).on_first(body(&first)).expect("a challenge");
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
    let good = initial(PLAIN, b"n,,n=,r=abc");
    let fresh = || server("plain");
    assert!(fresh().on_first(&good).is_ok());
    assert!(fresh().on_first(&initial(PLAIN, b"y,,n=,r=abc")).is_ok());
    for length in 0..good.len() {
        assert!(fresh().on_first(&good[..length]).is_err(), "{length} bytes");
    }
    let no_response = [PLAIN.as_bytes(), b"\0", &(-1_i32).to_be_bytes()].concat();
    let long = [&b"n,,n=,r="[..], &[b'a'; 1100]].concat();
    let bodies = [
        initial("SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,,n=,r=abc"),
        initial("SCRAM-SHA-1", b"n,,n=,r=abc"),
        initial(PLAIN, b"p=tls-server-end-point,,n=,r=abc"),
        initial(PLAIN, b"n,a=x,n=,r=abc"),
        initial(PLAIN, b"n,,m=x,n=,r=abc"),
        initial(PLAIN, b"n,,n=,r="),
        initial(PLAIN, b"n,,n=,r=a\x7fc"),
        initial(PLAIN, b"n,,n=,r=a\0c"),
        initial(PLAIN, b"n,,n=,r=\xff"),
        initial(PLAIN, b"x,,n=,r=abc"),
        initial(PLAIN, b""),
        initial(PLAIN, &long),
        [good.as_slice(), b"x"].concat(),
        no_response,
    ];
    for body in bodies {
        let error = fresh().on_first(&body).expect_err(&String::from_utf8_lossy(&body));
        let known = [sqlstate::PROTOCOL_VIOLATION, sqlstate::FEATURE_NOT_SUPPORTED];
        assert!(known.contains(&error.sqlstate) && error.severity == Severity::Fatal, "{error}");
    }
}

#[test]
fn an_exchange_cannot_be_bent() {
    let start = || {
        let mut server = server("plain");
        let mut client = client("plain", "pencil");
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
    let (mut started, first, _) = start();
    assert!(started.on_first(&first).is_err(), "a second initial response");
    assert!(self::server("plain").on_final(&last).is_err(), "no challenge yet");
}

#[test]
fn other_methods_are_answered_as_asked() {
    let login = || client("md5_user", "password");
    assert_eq!(login().respond(&request(3, b"")), Ok(Some(b"p\0\0\0\x0dpassword\0".to_vec())));
    let hashed = login().respond(&request(5, &[0x2a, 0x3d, 0x8f, 0xe0])).expect("valid").expect("an answer");
    assert_eq!(body(&hashed), b"md562af4dd09bbb41884907a838a3233294\0");
    let mut trusted = client("x", "");
    assert_eq!(trusted.respond(&request(0, b"")), Ok(None));
    assert!(trusted.is_done());
}

#[test]
fn a_server_that_cheats_is_refused() {
    let started = || {
        let mut client = client("x", "pencil");
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
        ("only PLUS", client("x", "y").respond(&request(10, b"SCRAM-SHA-256-PLUS\0\0"))),
        ("no password", client("x", "").respond(&request(10, b"SCRAM-SHA-256\0\0"))),
        ("GSS", client("x", "y").respond(&request(7, b""))),
        ("short salt", client("x", "y").respond(&request(5, b"abc"))),
        ("cut short", client("x", "y").respond(&[0, 0])),
    ];
    for (what, answer) in refusals {
        let error = answer.expect_err(what);
        assert_eq!((error.sqlstate, error.blame), (sqlstate::CANNOT_CONNECT, Blame::Server), "{what}");
    }
    let mut failed = started();
    assert!(failed.respond(&request(11, b"bad")).is_err());
    assert!(failed.respond(&request(11, b"bad")).is_err());
}

const CERTIFICATE: [u8; 32] = [4; 32];

fn tls_server(user: &str) -> ScramServer {
    ScramServer::new(user, expected(user), Some(CERTIFICATE.into()))
}

fn tls_client(credential: Credential, certificate: [u8; 32]) -> ClientAuth {
    ClientAuth::new("plain", Arc::new(credential), Channel::Tls(Some(certificate.to_vec())))
}

#[test]
fn channel_binding_is_chosen_and_checked() {
    let pencil = || Credential::password("pencil");
    assert_eq!(tls_server("plain").mechanisms(), [PLUS, PLAIN]);
    let first = tls_client(pencil(), CERTIFICATE).respond(&offer(&tls_server("plain")));
    let first = first.expect("valid").expect("first");
    assert!(body(&first).starts_with(b"SCRAM-SHA-256-PLUS\0"));
    assert!(body(&first)[23..].starts_with(b"p=tls-server-end-point,,"));
    let keys = exchange(tls_server("plain"), tls_client(pencil(), CERTIFICATE)).expect("bound").keys;
    exchange(tls_server("plain"), client("plain", "pencil")).expect("a client that cannot bind");
    for credential in [pencil(), Credential::Scram(Arc::new(keys))] {
        let error = exchange(tls_server("plain"), tls_client(credential, [5; 32])).expect_err("another certificate");
        // Fresh salts do not fit learnt keys, so those are refused even earlier.
        assert!(matches!(error.sqlstate, sqlstate::INVALID_AUTHORIZATION | sqlstate::CANNOT_CONNECT), "{error}");
    }
}

#[test]
fn learnt_keys_bind_to_the_certificate_too() {
    let verifier = expected("plain").verifier;
    let server = || {
        let expected = Expected { verifier: verifier.clone(), known: true };
        ScramServer::new("plain", expected, Some(CERTIFICATE.into()))
    };
    let keys = exchange(server(), tls_client(Credential::password("pencil"), CERTIFICATE)).expect("bound").keys;
    let keys = Credential::Scram(Arc::new(keys));
    exchange(server(), tls_client(keys.clone(), CERTIFICATE)).expect("bound by keys");
    let error = exchange(server(), tls_client(keys, [5; 32])).expect_err("another certificate");
    assert_eq!(&*error.message, "SCRAM channel binding check failed");
}

#[test]
fn a_cut_offer_is_noticed() {
    // Somebody between the two takes PLUS out of the offer: the client says that it could bind.
    let mut client = tls_client(Credential::password("pencil"), CERTIFICATE);
    let first = client.respond(&request(10, b"SCRAM-SHA-256\0\0")).expect("valid").expect("first");
    let error = tls_server("plain").on_first(body(&first)).expect_err("refused");
    assert_eq!(
        (error.sqlstate, &*error.message),
        (sqlstate::INVALID_AUTHORIZATION, "SCRAM channel binding negotiation error")
    );
    server("plain").on_first(body(&first)).expect("a server without certificate takes it at its word");
    for (mechanism, message) in [
        (PLUS, &b"n,,n=,r=abc"[..]),
        (PLUS, b"y,,n=,r=abc"),
        (PLUS, b"p=tls-unique,,n=,r=abc"),
        (PLAIN, b"p=tls-server-end-point,,n=,r=abc"),
    ] {
        let error = tls_server("plain").on_first(&initial(mechanism, message)).expect_err("refused");
        assert_eq!(error.sqlstate, sqlstate::PROTOCOL_VIOLATION, "{error}");
    }
}

#[test]
fn keys_learnt_from_a_login_log_in_where_the_verifier_is_the_same() {
    let verifier = expected("plain").verifier;
    let holding =
        |verifier: &Verifier| ScramServer::new("plain", Expected { verifier: verifier.clone(), known: true }, None);
    let proven = exchange(holding(&verifier), client("plain", "pencil")).expect("the first login");
    let keys = Credential::Scram(Arc::new(proven.keys));
    let with_keys = || ClientAuth::new("plain", Arc::new(keys.clone()), Channel::Plain);
    exchange(holding(&verifier), with_keys()).expect("the second, by keys");
    let error = exchange(server("plain"), with_keys()).expect_err("another salt");
    assert_eq!(error.sqlstate, sqlstate::CANNOT_CONNECT);
    assert!(error.detail.expect("detail").contains("verifier"));
    // The same salt, another password: the server refuses the proof; and a server without the verifier is found out.
    let other = Verifier { stored_key: [1; 32], ..verifier.clone() };
    assert_eq!(exchange(holding(&other), with_keys()).expect_err("refused").sqlstate, sqlstate::INVALID_PASSWORD);
    let impostor = Verifier { server_key: [1; 32], ..verifier };
    let error = exchange(holding(&impostor), with_keys()).expect_err("an impostor");
    assert!(error.detail.expect("detail").contains("prove"));
    for challenge in [&b"r=abc,s=AAAA,i=4096"[..], b"", b"r=", b"\xff", b"m=x,r=abc,s=AAAA,i=4096"] {
        let mut client = with_keys();
        client.respond(&request(10, b"SCRAM-SHA-256\0\0")).expect("valid");
        assert!(client.respond(&request(11, challenge)).is_err());
    }
}

#[test]
fn each_credential_fits_its_methods_only() {
    let md5 = || Arc::new(Credential::Md5(Md5Hash::derive("md5_user", "password")));
    let login =
        |code: i32, data: &[u8]| ClientAuth::new("md5_user", md5(), Channel::Plain).respond(&request(code, data));
    let hashed = login(5, &[0x2a, 0x3d, 0x8f, 0xe0]).expect("valid").expect("an answer");
    assert_eq!(body(&hashed), b"md562af4dd09bbb41884907a838a3233294\0");
    assert!(login(3, b"").is_err() && login(10, b"SCRAM-SHA-256\0\0").is_err());
    let keys = ScramKeys { client_key: [1; 32], verifier: expected("plain").verifier };
    let keys = Arc::new(Credential::Scram(Arc::new(keys)));
    for (code, data) in [(3, &b""[..]), (5, b"salt")] {
        let error = ClientAuth::new("x", Arc::clone(&keys), Channel::Plain).respond(&request(code, data));
        assert!(error.expect_err("refused").hint.is_some());
    }
}
