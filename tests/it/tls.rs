//! TLS on both sides: what clients can ask for, client certificates, channel binding, and connections to the servers.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use weir_harness::{Tier, connect};

use crate::auth::restart_with;
use crate::freshness::until;
use crate::raw::error_text;

/// A throw-away authority and a directory for what it signs.
pub struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let dir = tempfile::tempdir()?;
        // A name of its own: OpenSSL finds the signer by it.
        params.distinguished_name.push(DnType::CommonName, dir.path().display().to_string());
        let certificate = params.self_signed(&key)?;
        let authority = Self { dir, issuer: Issuer::new(params, key), certificate };
        std::fs::write(authority.path("ca.crt"), authority.certificate.pem())?;
        Ok(authority)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `<name>.crt` and `<name>.key`, for these hosts and this common name.
    pub fn sign(&self, name: &str, hosts: &[&str]) -> Result<(CertificateDer<'static>, KeyPair)> {
        let key = KeyPair::generate()?;
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer)?;
        std::fs::write(self.path(&format!("{name}.crt")), certificate.pem())?;
        let path = self.path(&format!("{name}.key"));
        std::fs::write(&path, key.serialize_pem())?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok((certificate.der().clone(), key))
    }

    /// A `[tls]` section for weir, with certificates for the loopback address.
    fn section(&self, mode: &str) -> Result<String> {
        self.sign("weir", &["localhost", "127.0.0.1"])?;
        Ok(format!(
            "[tls]\ncertificate = '{}'\nkey = '{}'\nclient_ca = '{}'\nmode = \"{mode}\"\n",
            self.path("weir.crt").display(),
            self.path("weir.key").display(),
            self.path("ca.crt").display()
        ))
    }

    fn client(
        &self,
        alpn: Option<&[u8]>,
        identity: Option<(CertificateDer<'static>, KeyPair)>,
    ) -> Result<tokio_rustls::TlsConnector> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.der().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
                builder.with_client_auth_cert(vec![certificate], key)?
            }
        };
        config.alpn_protocols = alpn.map(<[u8]>::to_vec).into_iter().collect();
        Ok(tokio_rustls::TlsConnector::from(Arc::new(config)))
    }
}

impl Authority {
    /// The argument of libpq that trusts this authority alone.
    fn trusted(&self) -> String {
        format!("sslmode=verify-ca sslrootcert={}", self.path("ca.crt").display())
    }
}

/// psql with an environment and a connection string; what it printed, or its complaint.
async fn psql(tier: &Tier, parameters: &str, environment: &[(&str, &str)]) -> Result<String, String> {
    let conninfo = format!("host=localhost hostaddr=127.0.0.1 port={} dbname=shop user=shop {parameters}", tier.port());
    let mut command = tokio::process::Command::new("psql");
    command.args(["-XAtq", "-c", "SELECT 40 + 2", &conninfo]).stdin(Stdio::null()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("PGPASSWORD", &tier.state.shop_password).envs(environment.iter().copied());
    let said = command.output().await.map_err(|error| format!("psql must be installed: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if said.status.success() { Ok(text(&said.stdout)) } else { Err(text(&said.stderr)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sslmode_does_what_it_does_with_postgres() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).config_extra(&authority.section("allow")?).start().await?;
    let root = format!("sslrootcert={}", authority.path("ca.crt").display());
    let yes = Ok("42".to_owned());
    for mode in ["disable", "allow", "prefer", "require"] {
        assert_eq!(psql(&tier, &format!("sslmode={mode}"), &[]).await, yes, "{mode}");
    }
    for mode in ["verify-ca", "verify-full"] {
        assert_eq!(psql(&tier, &format!("sslmode={mode} {root}"), &[]).await, yes, "{mode}");
    }
    let other = Authority::new()?;
    let foreign = format!("sslmode=verify-ca sslrootcert={}", other.path("ca.crt").display());
    let refused = psql(&tier, &foreign, &[]).await.expect_err("another authority");
    assert!(refused.contains("certificate verify failed"), "{refused}");
    let full = format!("sslmode=verify-full {root} host=elsewhere.example.com");
    let refused = psql(&tier, &full, &[]).await.expect_err("another host");
    assert!(refused.contains("does not match"), "{refused}");
    // Channel binding: there with TLS, not without; SCRAM-SHA-256-PLUS is what libpq then insists on.
    for binding in ["require", "prefer", "disable"] {
        assert_eq!(psql(&tier, "sslmode=require", &[("PGCHANNELBINDING", binding)]).await, yes, "{binding}");
    }
    let plain = psql(&tier, "sslmode=disable", &[("PGCHANNELBINDING", "require")]).await;
    let plain = plain.expect_err("nothing to bind to");
    assert!(plain.contains("channel binding"), "{plain}");
    let wrong = psql(&tier, "sslmode=require", &[("PGPASSWORD", "wrong"), ("PGCHANNELBINDING", "require")]).await;
    assert!(wrong.expect_err("a wrong password").contains("password authentication failed for user \"shop\""));

    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).config_extra(&authority.section("require")?).start().await?;
    let refused = psql(&tier, "sslmode=disable", &[]).await.expect_err("plain");
    assert!(refused.contains("encrypted connections only"), "{refused}");
    for mode in ["allow", "prefer", "require"] {
        assert_eq!(psql(&tier, &format!("sslmode={mode}"), &[]).await, yes, "{mode}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_after_a_reload() -> Result<()> {
    let (old, new) = (Authority::new()?, Authority::new()?);
    let extra = format!("admin_users = [\"shop\"]\n{}", old.section("allow")?);
    let tier = Tier::builder().shards(1).config_extra(&extra).start().await?;
    let console = connect(&tier.dsn("weir")).await?;
    let held = connect(&tier.dsn("shop")).await?;
    let yes = Ok("42".to_owned());
    assert_eq!(psql(&tier, &old.trusted(), &[]).await, yes);

    new.section("allow")?;
    std::fs::copy(new.path("weir.crt"), old.path("weir.crt"))?;
    let error = console.simple_query("RELOAD").await.err().context("a key of another certificate")?;
    let error = error.as_db_error().context("told")?;
    assert_eq!(error.code().code(), "F0000");
    assert!(error.detail().is_some_and(|detail| detail.contains("do not fit each other")), "{error:?}");
    assert_eq!(psql(&tier, &old.trusted(), &[]).await, yes, "the old pair stays in force");

    std::fs::copy(new.path("weir.key"), old.path("weir.key"))?;
    console.simple_query("RELOAD").await?;
    assert_eq!(psql(&tier, &new.trusted(), &[("PGCHANNELBINDING", "require")]).await, yes);
    assert!(psql(&tier, &old.trusted(), &[]).await.is_err(), "the old certificate is still shown");
    held.simple_query("SELECT 1").await.context("who was there stays")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_prove_who_a_client_is() -> Result<()> {
    let authority = Authority::new()?;
    authority.sign("shop", &[])?;
    authority.sign("someone", &[])?;
    std::fs::write(
        authority.path("pg_hba.conf"),
        "hostssl shop shop all cert\nhostssl weir shop all scram-sha-256 clientcert=verify-full\n\
         hostssl all shop all trust clientcert=verify-ca\n",
    )?;
    let config = format!("hba_file = {:?}\n{}", authority.path("pg_hba.conf"), authority.section("allow")?);
    let tier = Tier::builder().shards(1).config_extra(&config).start().await?;
    let with = |name: &str| {
        let (certificate, key) = (authority.path(&format!("{name}.crt")), authority.path(&format!("{name}.key")));
        format!("sslmode=require sslcert={} sslkey={}", certificate.display(), key.display())
    };
    assert_eq!(psql(&tier, &with("shop"), &[("PGPASSWORD", "not needed")]).await, Ok("42".to_owned()));
    let other = psql(&tier, &with("someone"), &[]).await.expect_err("another name");
    assert!(other.contains("certificate authentication failed for user \"shop\""), "{other}");
    let none = psql(&tier, "sslmode=require", &[]).await.expect_err("no certificate");
    assert!(none.contains("connection requires a valid client certificate"), "{none}");
    let plain = psql(&tier, "sslmode=disable", &[]).await.expect_err("plain");
    assert!(plain.contains("no pg_hba.conf entry for host") && plain.contains("no encryption"), "{plain}");
    // A certificate that somebody else has signed does not get through the handshake.
    let stranger = Authority::new()?;
    stranger.sign("shop", &[])?;
    let foreign = format!(
        "sslmode=require sslcert={} sslkey={}",
        stranger.path("shop.crt").display(),
        stranger.path("shop.key").display()
    );
    psql(&tier, &foreign, &[]).await.expect_err("signed by a stranger");

    let console = |name: &str| format!("{} dbname=weir", with(name));
    let full = psql(&tier, &console("someone"), &[]).await.expect_err("the right password, another's certificate");
    assert!(full.contains("password authentication failed"), "{full}");
    let wrong = psql(&tier, &console("shop"), &[("PGPASSWORD", "wrong")]).await.expect_err("a wrong password");
    assert!(wrong.contains("password authentication failed"), "{wrong}");
    let shown = psql(&tier, &console("shop"), &[]).await.expect_err("the console knows no such command");
    assert!(!shown.contains("FATAL"), "let in: {shown}");
    // verify-ca alone does not look at the name, and trust asks for nothing more.
    let missing =
        psql(&tier, &format!("{} dbname=elsewhere", with("someone")), &[]).await.expect_err("no such database");
    assert!(missing.contains("does not exist"), "{missing}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_may_begin_at_once() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).config_extra(&authority.section("require")?).start().await?;
    let name = ServerName::try_from("localhost")?;
    let dial = || TcpStream::connect(("127.0.0.1", tier.port()));
    let direct = authority.client(Some(b"postgresql"), None)?;
    let stream = direct.connect(name.clone(), dial().await?).await?;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"postgresql"[..]));
    let config: tokio_postgres::Config = tier.dsn("shop").parse()?;
    let (client, connection) = config.connect_raw(stream, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    assert_eq!(client.query_one("SELECT 40 + 2", &[]).await?.get::<_, i32>(0), 42);

    // Without the protocol's name, or under another's, nobody gets in.
    for alpn in [None, Some(&b"http/1.1"[..])] {
        let answer = async {
            let mut stream = authority.client(alpn, None)?.connect(name.clone(), dial().await?).await?;
            stream.write_all(b"\0\0\0\x1d\0\x03\0\0user\0shop\0database\0shop\0\0").await?;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            anyhow::Ok(answer)
        };
        let answer = tokio::time::timeout(std::time::Duration::from_secs(10), answer).await.context("ends")?;
        assert!(answer.map_or(true, |answer| answer.is_empty()), "{alpn:?}");
    }
    // A TLS record that is none.
    let mut stream = dial().await?;
    stream.write_all(&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3]).await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    ended.context("closed")?.ok();
    assert!(!answer.starts_with(b"R"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_offer_of_mechanisms_is_noticed() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).config_extra(&authority.section("allow")?).start().await?;
    let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
    stream.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await?;
    assert_eq!(stream.read_u8().await?, b'S');
    let mut stream = authority.client(None, None)?.connect(ServerName::try_from("localhost")?, stream).await?;
    stream.write_all(b"\0\0\0\x21\0\x03\0\0user\0shop\0database\0shop\0\0").await?;
    let mut offer = vec![0; 9 + 34];
    stream.read_exact(&mut offer).await?;
    assert!(offer.ends_with(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"), "{:?}", String::from_utf8_lossy(&offer));
    // As a client would answer to whom PLUS was not shown: "I could, but you cannot".
    let first = b"y,,n=,r=abcdefgh";
    let mut message = b"p\0\0\0\x26SCRAM-SHA-256\0\0\0\0\x10".to_vec();
    message.extend_from_slice(first);
    assert_eq!(message.len(), 1 + 0x26);
    stream.write_all(&message).await?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert_eq!(answer.first(), Some(&b'E'));
    assert_eq!(error_text(&answer[5..]), "28000 SCRAM channel binding negotiation error");
    Ok(())
}

fn of_hub(tier: &Tier) -> impl Iterator<Item = &weir_harness::Server> {
    std::iter::once(&*tier.hub).chain(tier.hub_replicas.iter().map(|replica| &**replica))
}

/// Makes a server take TLS only, except from the harness's own superuser on database `postgres`.
async fn demand_tls(tier: &Tier, authority: &Authority, host: &str) -> Result<()> {
    authority.sign("server", &[host])?;
    for server in tier.shards.iter().flat_map(weir_harness::Shard::servers).chain(of_hub(tier)) {
        let admin = server.admin("postgres").await?;
        for (from, to) in [("server.crt", "server.crt"), ("server.key", "server.key")] {
            let path = server.dir().join("data").join(to);
            std::fs::copy(authority.path(from), &path)?;
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
            tier.run.account().own(&path)?;
        }
        admin.batch_execute("ALTER SYSTEM SET ssl = on").await?;
        let rules = "hostssl all all all scram-sha-256\nhostssl replication all all scram-sha-256\n\
                     hostnossl postgres weir_admin all scram-sha-256\n";
        std::fs::write(server.dir().join("data/pg_hba.conf"), rules)?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
        // New connections see the new files once the postmaster has read them.
        for _ in 0..200 {
            let asked = server.admin("postgres").await?;
            if asked.query_one("SHOW ssl", &[]).await?.get::<_, String>(0) == "on" {
                break;
            }
        }
        // What is there already stays plain: everything has to be opened anew.
        admin
            .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'")
            .await?;
    }
    Ok(())
}

fn set_server_tls(tier: &Tier, section: &str) -> Result<()> {
    let path = tier.run.path().join("weir.toml");
    let mut config: toml::Table = std::fs::read_to_string(&path)?.parse()?;
    config.insert("server_tls".to_owned(), toml::Value::Table(section.parse()?));
    std::fs::write(&path, toml::to_string(&config)?)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_reached_over_verified_tls() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    demand_tls(&tier, &authority, "127.0.0.1").await?;
    set_server_tls(&tier, &format!("mode = \"verify-full\"\nca = '{}'", authority.path("ca.crt").display()))?;
    tier.restart_weir().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, x int)").await?;
    for user in 0..20_i64 {
        client.execute("INSERT INTO users VALUES ($1, 1)", &[&user]).await?;
    }
    assert_eq!(client.query_one("SELECT count(*) FROM users", &[]).await?.get::<_, i64>(0), 20);
    // Everything of weir's is inside TLS: clients' statements, catalogue, clock, probes, hub.
    let count = "SELECT count(*) FILTER (WHERE ssl), count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name LIKE $1";
    for (server, names) in
        [(&*tier.shards[0].primary, "weir%"), (&*tier.hub, "weir hub%"), (&*tier.shards[0].primary, "weir probe")]
    {
        let row = server.admin("postgres").await?.query_one(count, &[&names]).await?;
        let (encrypted, all) = (row.get::<_, i64>(0), row.get::<_, i64>(1));
        assert!(encrypted > 0 && encrypted == all, "{}: {encrypted} of {all} {names}", server.name());
    }
    // A large result and a large statement pass through TLS whole.
    let big: String = client.query_one("SELECT repeat($1, 300000)", &[&"0123456789"]).await?.get(0);
    assert_eq!(big.len(), 3_000_000);
    assert_eq!(client.query_one("SELECT length($1::text)", &[&big]).await?.get::<_, i32>(0), 3_000_000);

    // A cancel reaches a statement inside TLS.
    let cancel = client.cancel_token();
    let sleeping = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(600)").await });
    let admin = tier.shards[0].primary.admin("postgres").await?;
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND state = 'active' AND pid <> pg_backend_pid()";
    let sleeps = async || Ok(admin.query_one(asleep, &[]).await?.get::<_, i64>(0) > 0 || sleeping.is_finished());
    until(sleeps).await.with_context(|| format!("the statement sleeps\n{}", tier.weir_log()))?;
    cancel.cancel_query(tokio_postgres::NoTls).await?;
    let error = tokio::time::timeout(std::time::Duration::from_secs(20), sleeping).await??.expect_err("cancelled");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("57014"));
    Ok(())
}

/// The hub's server is the one that verifies the shards then, by a file of its own.
#[tokio::test(flavor = "multi_thread")]
async fn the_fallback_engine_verifies_the_shards_too() -> Result<()> {
    let (authority, other) = (Authority::new()?, Authority::new()?);
    let tier = Tier::builder().hub_replicas(1).start().await?;
    demand_tls(&tier, &authority, "127.0.0.1").await?;
    let of_hub = tier.hub.dir();
    for (from, name) in [(&authority, "shards.crt"), (&other, "others.crt")] {
        let path = of_hub.join(name);
        std::fs::copy(from.path("ca.crt"), &path)?;
        tier.run.account().own(&path)?;
    }
    let config = tier.run.path().join("weir.toml");
    let written = std::fs::read_to_string(&config)?;
    let sql = "SELECT user_id, rank() OVER (ORDER BY x) FROM users";
    for (mode, file, why) in [
        ("verify-full", None, Some("engine.server_ca")),
        ("verify-full", Some("missing.crt"), Some("does not exist")),
        ("verify-ca", Some("others.crt"), Some("certificate verify failed")),
        ("verify-ca", Some("shards.crt"), None),
        ("verify-full", Some("shards.crt"), None),
    ] {
        let engine =
            file.map_or(String::new(), |file| format!("\n[engine]\nserver_ca = '{}'\n", of_hub.join(file).display()));
        std::fs::write(&config, format!("{written}{engine}"))?;
        set_server_tls(&tier, &format!("mode = \"{mode}\"\nca = '{}'", authority.path("ca.crt").display()))?;
        tier.restart_weir().await?;
        let client = tier.connect().await?;
        client.batch_execute("CREATE TABLE IF NOT EXISTS users (user_id bigint PRIMARY KEY, x int)").await?;
        client.batch_execute("INSERT INTO users VALUES (7, 1) ON CONFLICT DO NOTHING").await?;
        let answer = client.query_one(sql, &[]).await;
        let Some(why) = why else {
            assert_eq!(answer?.get::<_, i64>(0), 7, "{mode} {file:?}");
            continue;
        };
        let error = answer.err().with_context(|| format!("{mode} {file:?}"))?;
        let error = error.as_db_error().context("an error of weir's")?;
        assert_eq!(error.code().code(), "0A000", "{error:?}");
        assert!(error.detail().is_some_and(|detail| detail.contains(why)), "{error:?}");
    }
    let encrypted = "SELECT count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE ssl AND application_name = 'weir engine'";
    let ssl = tier.shards[1].primary.admin("postgres").await?.query_one(encrypted, &[]).await?;
    assert!(ssl.get::<_, i64>(0) > 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_under_a_wrong_name_is_not_talked_to() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).start().await?;
    demand_tls(&tier, &authority, "elsewhere.example.com").await?;
    let ca = format!("ca = '{}'", authority.path("ca.crt").display());
    // The name is not looked at: weir gets through, with keys learnt and bound to the certificate.
    for mode in ["require", "verify-ca"] {
        set_server_tls(&tier, &format!("mode = \"{mode}\"\n{ca}"))?;
        tier.restart_weir().await?;
        let client = tier.connect().await?;
        let row = client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await?;
        assert!(row.get::<_, bool>(0), "{mode}");
    }
    set_server_tls(&tier, "mode = \"prefer\"")?;
    tier.restart_weir().await?;
    tier.connect().await?;
    // The name counts, and so does the authority: weir does not become ready, and says why.
    let other = Authority::new()?;
    for section in [
        format!("mode = \"verify-full\"\n{ca}"),
        format!("mode = \"verify-ca\"\nca = '{}'", other.path("ca.crt").display()),
    ] {
        set_server_tls(&tier, &section)?;
        let before = tier.weir_log().len();
        assert!(tier.restart_weir().await.is_err(), "{section}");
        let log = tier.weir_log();
        assert!(log[before..].contains("certificate"), "{section}: {}", &log[before..]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_learnt_from_clients_work_over_tls() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).config_extra("[auth_query]\n").start().await?;
    demand_tls(&tier, &authority, "127.0.0.1").await?;
    set_server_tls(&tier, &format!("mode = \"verify-full\"\nca = '{}'", authority.path("ca.crt").display()))?;
    let admin = tier.shards[0].primary.admin("postgres").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'pencil'").await?;
    tier.restart_weir().await?;
    let client = connect(&format!("postgres://ann:pencil@127.0.0.1:{}/shop", tier.port())).await?;
    let row =
        client.query_one("SELECT session_user::text, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await?;
    assert_eq!((row.get::<_, String>(0).as_str(), row.get::<_, bool>(1)), ("ann", true));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn weir_shows_servers_a_certificate_of_its_own() -> Result<()> {
    let authority = Authority::new()?;
    let tier = Tier::builder().shards(1).start().await?;
    demand_tls(&tier, &authority, "127.0.0.1").await?;
    authority.sign("ann", &[])?;
    let primary = &tier.shards[0].primary;
    let data = primary.dir().join("data");
    std::fs::copy(authority.path("ca.crt"), data.join("root.crt"))?;
    tier.run.account().own(&data.join("root.crt"))?;
    let rules = std::fs::read_to_string(data.join("pg_hba.conf"))?;
    std::fs::write(data.join("pg_hba.conf"), format!("hostssl all ann all cert\n{rules}"))?;
    let admin = primary.admin("postgres").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN").await?;
    admin.batch_execute("ALTER SYSTEM SET ssl_ca_file = 'root.crt'").await?;
    // A restart, so that no old postmaster answers with the old settings.
    drop(admin);
    primary.restart().await?;
    let section = format!(
        "mode = \"verify-full\"\nca = '{}'\ncertificate = '{}'\nkey = '{}'",
        authority.path("ca.crt").display(),
        authority.path("ann.crt").display(),
        authority.path("ann.key").display()
    );
    set_server_tls(&tier, &section)?;
    let users = format!("[user.shop]\npassword = \"{}\"\n[user.ann]\n", tier.state.shop_password);
    restart_with(&tier, Some(&users), Some("host shop ann all trust\nhost all all all scram-sha-256\n")).await?;
    let client = connect(&format!("postgres://ann:nothing@127.0.0.1:{}/shop", tier.port())).await?;
    let sql = "SELECT session_user::text, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let row = client.query_one(sql, &[]).await?;
    assert_eq!((row.get::<_, String>(0).as_str(), row.get::<_, String>(1).contains("CN=ann")), ("ann", true));
    tier.connect().await.context("others log in by password beside it")?;
    Ok(())
}
