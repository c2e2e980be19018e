//! Logging in: SCRAM, TLS, limits, and what a refusal says.

use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use weir_harness::Tier;

use crate::raw::Raw;

#[tokio::test(flavor = "multi_thread")]
async fn wrong_logins_are_refused_alike() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let dsn = tier.dsn("shop");
    let password = dsn.split([':', '@']).nth(2).context("password")?.to_owned();
    for (from, to, code) in [
        (&*password, "wrong", "28P01"),
        ("//shop:", "//nobody:", "28P01"),
        ("/shop", "/elsewhere", "3D000"),
        ("/shop", "/weir_hub", "3D000"),
    ] {
        let wrong = if from == "/shop" {
            format!("{}{to}", dsn.strip_suffix("/shop").context("suffix")?)
        } else {
            dsn.replace(from, to)
        };
        let error = Raw::login(&wrong, &[]).await.err().context("refused")?.to_string();
        assert!(error.contains(code), "{wrong}: {error}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_before_tls_and_nonsense_end_the_connection() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let hostile: [&[u8]; 6] = [
        b"\0\0\0\x08\x04\xd2\x16\x2f\0\0\0\x08",
        b"\xff\xff\xff\xff",
        b"\0\0\0\x04",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x10\0\x03\0\0user\0\0x\0",
        b"\0\0\0\x09\0\x02\0\0\0",
    ];
    for bytes in hostile {
        let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        tokio::time::timeout(std::time::Duration::from_secs(10), stream.read_to_end(&mut answer))
            .await
            .context("closed")?
            .ok();
        assert!(!answer.starts_with(b"R"), "nobody is asked for a password after {bytes:?}");
    }
    // A password message that lies about its length, after a real startup.
    let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
    stream.write_all(b"\0\0\0\x1d\0\x03\0\0user\0shop\0database\0").await?;
    stream.write_all(b"shop\0\0").await?;
    stream.write_all(b"p\0\0\0\0").await?;
    let mut answer = Vec::new();
    tokio::time::timeout(std::time::Duration::from_secs(20), stream.read_to_end(&mut answer))
        .await
        .context("closed")?
        .ok();
    assert_eq!(tier.connect().await?.query("SELECT 1", &[]).await?.len(), 1, "others are served");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_served_over_tls() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let (certificate, key) = (dir.path().join("weir.crt"), dir.path().join("weir.key"));
    std::fs::write(&certificate, signed.cert.pem())?;
    std::fs::write(&key, signed.signing_key.serialize_pem())?;
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let tls = format!("[tls]\ncertificate = {certificate:?}\nkey = {key:?}\nmode = \"require\"");
    let tier = Tier::builder().shards(1).config_extra(&tls).start().await?;
    let plain = Raw::login(&tier.dsn("shop"), &[]).await.err().context("refused")?;
    assert!(plain.to_string().contains("28000"), "{plain}");

    let mut roots = rustls::RootCertStore::empty();
    roots.add(signed.cert.der().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
    stream.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await?;
    let mut answer = [0];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"S");
    let stream =
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost")?, stream).await?;
    let config: tokio_postgres::Config = tier.dsn("shop").parse()?;
    let (client, connection) = config.connect_raw(stream, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    assert_eq!(client.query_one("SELECT 40 + 2", &[]).await?.get::<_, i32>(0), 42);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_refuse_with_a_reason() -> Result<()> {
    let tier = Tier::builder()
        .shards(1)
        .config_extra("[limits]\nclient_connections_max = 2\n[pool]\nsize = 1\nwait_max = \"300ms\"")
        .start()
        .await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    let refused = weir_harness::connect(&tier.dsn("shop")).await.err().context("refused")?;
    assert_eq!(
        refused
            .downcast_ref::<tokio_postgres::Error>()
            .and_then(tokio_postgres::Error::code)
            .map(|code| code.code().to_owned())
            .as_deref(),
        Some("53300")
    );
    one.batch_execute("BEGIN").await?;
    one.batch_execute("SELECT 1").await?;
    let error = other.simple_query("SELECT 1").await.expect_err("the pool is exhausted");
    let error = error.as_db_error().context("a server error")?;
    assert_eq!(error.code().code(), "53300");
    assert!(error.detail().is_some_and(|detail| detail.contains("1/1 busy")), "{error:?}");
    assert!(error.hint().is_some());
    one.batch_execute("COMMIT").await?;
    assert_eq!(other.query("SELECT 1", &[]).await?.len(), 1, "the session survives");
    Ok(())
}
