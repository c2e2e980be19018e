//! Files as administrators write them, and who gets in by them.

use super::*;

fn peer(address: &str) -> Peer<'static> {
    Peer {
        address: address.parse().expect("an address"),
        local: "10.0.0.1".parse().expect("an address"),
        encrypted: false,
        user: "ann",
        database: "shop",
        replication: false,
    }
}

/// The line that decides; 0: none does.
fn line(text: &str, peer: &Peer<'_>) -> usize {
    let hba = Hba::parse(text).expect(text);
    hba.rules.iter().find(|rule| rule.fits(peer)).map_or(0, |rule| rule.line)
}

#[test]
fn the_first_rule_that_fits_decides() {
    let text = "# TYPE DATABASE USER ADDRESS METHOD\n\
                local all all peer\n\
                host  shop  bob  10.0.0.0/8  trust   # not ann\n\
                host  \"shop\",other ann, carl 10.1.0.0 255.255.0.0 scram-sha-256\n\
                \n\
                hostssl all all 0.0.0.0/0 cert\n\
                host all all \\\n  ::1/128 md5\n\
                hostgssenc all all all gss\n\
                host all all 10.0.0.0/8 reject\n";
    assert_eq!(line(text, &peer("10.1.2.3")), 4);
    assert_eq!(line(text, &Peer { user: "bob", ..peer("10.1.2.3") }), 3);
    assert_eq!(line(text, &Peer { user: "carl", database: "other", ..peer("10.1.2.3") }), 4);
    assert_eq!(line(text, &Peer { user: "carl", database: "third", ..peer("10.1.2.3") }), 10);
    assert_eq!(line(text, &Peer { encrypted: true, ..peer("192.168.1.1") }), 6);
    assert_eq!(line(text, &peer("::1")), 7);
    assert_eq!(line(text, &peer("::2")), 0);
    assert_eq!(line(text, &peer("::ffff:10.1.2.3")), 4, "an IPv4 client on an IPv6 socket");
    assert_eq!(line(text, &peer("192.168.1.1")), 0);
}

#[test]
fn keywords_lose_their_meaning_in_quotes() {
    let all = Peer { database: "all", user: "all", ..peer("1.2.3.4") };
    assert_eq!(line("host \"all\" \"all\" all trust", &peer("1.2.3.4")), 0);
    assert_eq!(line("host \"all\" \"all\" all trust", &all), 1);
    assert_eq!(line("host sameuser all all trust", &all), 1);
    assert_eq!(line("host sameuser all all trust", &peer("1.2.3.4")), 0);
    let odd = Peer { database: "a \"b\",c#", user: "+ann", ..peer("1.2.3.4") };
    assert_eq!(line("host \"a \"\"b\"\",c#\" \"+ann\" all trust", &odd), 1);
}

#[test]
fn replication_has_lines_of_its_own() {
    let walsender = Peer { replication: true, database: "", ..peer("10.0.0.9") };
    assert_eq!(line("host all all all trust\nhost replication ann all md5", &walsender), 2);
    let other = Peer { database: "replication", ..peer("10.0.0.9") };
    assert_eq!(line("host replication all all trust", &other), 0, "a database of that name is not meant");
    assert_eq!(line("host \"replication\" all all trust", &other), 1);
    let refusal = Hba::parse("host all all all trust").expect("valid").decide(&walsender).expect_err("no rule");
    assert_eq!(
        refusal.message,
        "no pg_hba.conf entry for replication connection from host \"10.0.0.9\", user \"ann\", no encryption"
    );
}

#[test]
fn networks_and_masks() {
    for (address, fits) in [
        ("10.0.0.0/8", true),
        ("10.1.2.3/32", true),
        ("10.1.2.4/32", false),
        ("0.0.0.0/0", true),
        ("::/0", false),
        ("10.1.2.3 255.255.255.255", true),
        ("10.9.9.9 255.0.0.0", true),
        ("10.1.0.0 255.255.254.0", false),
        ("samehost", false),
        ("all", true),
    ] {
        assert_eq!(line(&format!("host all all {address} trust"), &peer("10.1.2.3")) == 1, fits, "{address}");
    }
    for address in ["10.0.0.1", "127.0.0.1", "::1", "::ffff:10.0.0.1"] {
        assert_eq!(line("host all all samehost trust", &peer(address)), 1, "{address}");
    }
}

#[test]
fn refusals_speak_as_postgres_does() {
    let hba = Hba::parse("host all bob all reject\nhostssl all all all trust").expect("valid");
    let error = hba.decide(&peer("1.2.3.4")).expect_err("no rule");
    assert_eq!(
        (error.sqlstate, &*error.message),
        ("28000", "no pg_hba.conf entry for host \"1.2.3.4\", user \"ann\", database \"shop\", no encryption")
    );
    assert!(error.hint.is_some());
    let error = hba.decide(&Peer { user: "bob", encrypted: true, ..peer("1.2.3.4") }).expect_err("rejected");
    assert_eq!(
        error.message,
        "pg_hba.conf rejects connection for host \"1.2.3.4\", user \"bob\", database \"shop\", SSL encryption"
    );
    assert_eq!(hba.decide(&Peer { encrypted: true, ..peer("1.2.3.4") }).expect("a rule").method, Method::Trust);
    assert_eq!(Hba::default().decide(&peer("::9")).expect("a rule").method, Method::AsStored);
    assert_eq!(Hba::parse("").expect("valid").decide(&peer("::1")).map(|rule| rule.line).ok(), None);
}

#[test]
fn certificates_are_asked_for_where_the_line_says_so() {
    let text = "hostssl all all all scram-sha-256 clientcert=verify-full\nhostssl all all all cert";
    let hba = Hba::parse(text).expect("valid");
    assert_eq!(hba.rules[0].certificate, ClientCertificate::VerifyFull);
    assert_eq!(hba.asks_for_certificates(), Some(1));
    assert_eq!(Hba::default().asks_for_certificates(), None);
}

#[test]
fn what_cannot_be_honoured_is_an_error_with_its_line() {
    for (bad, says) in [
        ("hosts all all all trust", "unknown connection type"),
        ("host", "ends before the databases"),
        ("host all", "ends before the users"),
        ("host all all", "ends before the address"),
        ("host all all all", "ends before the method"),
        ("host all all 10.0.0.0", "network mask"),
        ("host all all 10.0.0.0/33 trust", "is not a network"),
        ("host all all 10.0.0.0/+8 trust", "is not a network"),
        ("host all all 10.0.0.0 255.0.255.0 trust", "is not a network mask"),
        ("host all all 10.0.0.0 ff:: trust", "is not a network mask"),
        ("host all all db1.example.com trust", "is not an address"),
        ("host all all samenet trust", "samenet"),
        ("host /^a all all trust", "database `/^a`"),
        ("host all +staff all trust", "user `+staff`"),
        ("host @list all all trust", "database `@list`"),
        ("host samerole all all trust", "samerole"),
        ("host all all all password", "method `password`"),
        ("host all all all ldap", "method `ldap`"),
        ("host all all all cert", "hostssl"),
        ("host all all all md5 clientcert=verify-ca", "hostssl"),
        ("hostssl all all all md5 clientcert=1", "clientcert"),
        ("hostssl all all all cert clientcert=verify-ca", "contradicts"),
        ("hostssl all all all cert map=m", "option `map`"),
        ("host all all all md5 what", "name=value"),
        ("host all \"ann all md5", "not closed"),
        ("host,hostssl all all all md5", "more than one connection type"),
        ("host all ann,", "comma"),
        ("include_dir conf.d", "include"),
        ("local all all", "ends before the method"),
    ] {
        let error = Hba::parse(&format!("# one\n\n{bad}\n")).expect_err(bad);
        assert_eq!(error.line, 3, "{bad}");
        assert!(error.message.contains(says), "{bad}: {}", error.message);
    }
}
