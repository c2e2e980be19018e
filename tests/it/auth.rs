//! Who gets in and by what: verifiers, keys learnt from clients, auth_query, MD5, HBA rules, settings of users.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Tier, connect};

use crate::freshness::until;
use crate::raw::Raw;

/// A URL for another user, or another password, through weir.
fn dsn(tier: &Tier, user: &str, password: &str) -> String {
    format!("postgres://{user}:{password}@127.0.0.1:{}/shop", tier.port())
}

/// The SQLSTATE of a login that must fail.
async fn refusal(dsn: &str) -> Result<String> {
    let error = connect(dsn).await.err().with_context(|| format!("{dsn} was let in"))?;
    let error = error.downcast_ref::<tokio_postgres::Error>().context("the driver's error")?;
    Ok(error.as_db_error().with_context(|| format!("a server's error, not {error}"))?.code().code().to_owned())
}

async fn one(client: &Client, sql: &str) -> Result<String> {
    for message in client.simple_query(sql).await? {
        if let SimpleQueryMessage::Row(row) = message {
            return Ok(row.get(0).unwrap_or("NULL").to_owned());
        }
    }
    anyhow::bail!("no row: {sql}")
}

/// Replaces weir's users file and rules, and starts it again with them.
pub async fn restart_with(tier: &Tier, users: Option<&str>, rules: Option<&str>) -> Result<()> {
    let dir = tier.run.path();
    let private = |name: &str, text: &str| std::fs::write(dir.join(name), text);
    if let Some(users) = users {
        private("users.toml", users)?;
    }
    if let Some(rules) = rules {
        private("pg_hba.conf", rules)?;
        let config = dir.join("weir.toml");
        let text = std::fs::read_to_string(&config)?;
        if !text.contains("hba_file") {
            std::fs::write(&config, format!("hba_file = \"pg_hba.conf\"\n{text}"))?;
        }
    }
    tier.restart_weir().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verifier_is_enough_for_clients_and_servers() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let password = tier.state.shop_password.clone();
    let first = tier.shards[0].primary.admin("postgres").await?;
    let verifier = one(&first, "SELECT rolpassword FROM pg_authid WHERE rolname = 'shop'").await?;
    // Every server gets the same one: logging in by keys needs it.
    let second = tier.shards[1].primary.admin("postgres").await?;
    second.batch_execute(&format!("ALTER ROLE shop PASSWORD '{verifier}'")).await?;
    restart_with(&tier, Some(&format!("[user.shop]\nverifier = \"{verifier}\"\n")), None).await?;

    assert_eq!(refusal(&dsn(&tier, "shop", "wrong")).await?, "28P01");
    let client = connect(&dsn(&tier, "shop", &password)).await?;
    assert_eq!(one(&client, "SELECT current_user").await?, "shop");
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, x int)").await?;
    for user in 0..40_i64 {
        client.execute("INSERT INTO users VALUES ($1, 1)", &[&user]).await?;
    }
    assert_eq!(one(&client, "SELECT count(*) FROM users").await?, "40", "both shards were written and read");
    for name in ["users.toml", "weir.toml"] {
        assert!(!std::fs::read_to_string(tier.run.path().join(name))?.contains(&password), "{name} holds the password");
    }

    // A server with another verifier of the same password cannot be logged in to: it says so, naming the reason.
    second.batch_execute(&format!("ALTER ROLE shop PASSWORD '{password}'")).await?;
    tier.restart_weir().await?;
    let error = connect(&dsn(&tier, "shop", &password)).await?;
    let error = error.simple_query("SELECT count(*) FROM users").await.expect_err("the second shard refuses");
    let error = error.as_db_error().context("a server's error")?;
    assert_eq!(error.code().code(), "08001");
    assert!(error.detail().is_some_and(|detail| detail.contains("verifier")), "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("same verifier")), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_looked_up_on_the_servers() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[auth_query]\n").start().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    admin
        .batch_execute(
            "CREATE ROLE ann LOGIN PASSWORD 'pencil'; CREATE ROLE nologin PASSWORD 'pencil';
             CREATE ROLE old LOGIN PASSWORD 'pencil' VALID UNTIL '2020-01-01';
             CREATE ROLE ever LOGIN PASSWORD 'pencil' VALID UNTIL 'infinity';
             CREATE ROLE never LOGIN PASSWORD 'pencil' VALID UNTIL '-infinity';
             CREATE ROLE bare LOGIN; CREATE ROLE \"o'x; --\" LOGIN PASSWORD 'pencil'",
        )
        .await?;
    for user in ["ann", "ever"] {
        let client = connect(&dsn(&tier, user, "pencil")).await?;
        assert_eq!(one(&client, "SELECT session_user").await?, user);
        assert_eq!(refusal(&dsn(&tier, user, "pencils")).await?, "28P01");
    }
    let odd = connect(&dsn(&tier, "o%27x%3B%20--", "pencil")).await?;
    assert_eq!(one(&odd, "SELECT session_user").await?, "o'x; --");
    for user in ["nologin", "old", "never", "bare", "nobody", "x'%20OR%20'1'%3D'1"] {
        assert_eq!(refusal(&dsn(&tier, user, "pencil")).await?, "28P01", "{user}");
    }

    // A new password counts at once, on both sides: new connections to the servers use the key it gave away.
    let before = connect(&dsn(&tier, "ann", "pencil")).await?;
    before.batch_execute("BEGIN; SELECT 1").await?; // The one connection there is stays taken.
    admin.batch_execute("ALTER ROLE ann PASSWORD 'eraser'").await?;
    assert_eq!(refusal(&dsn(&tier, "ann", "pencil")).await?, "28P01");
    let after = connect(&dsn(&tier, "ann", "eraser")).await?;
    assert_eq!(one(&after, "SELECT session_user").await?, "ann");
    assert_eq!(one(&before, "SELECT session_user").await?, "ann", "sessions from before live on, as in Postgres");
    admin.batch_execute("ALTER ROLE ann NOLOGIN").await?;
    assert_eq!(refusal(&dsn(&tier, "ann", "eraser")).await?, "28P01");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn auth_query_cannot_be_led_astray_by_search_path() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[auth_query]\n").start().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    let verifier = one(&admin, "SELECT rolpassword FROM pg_authid WHERE rolname = 'shop'").await?;
    // Whoever may create in a schema on the path could answer for pg_authid or for `=`.
    admin
        .batch_execute(&format!(
            "CREATE ROLE victim LOGIN PASSWORD 'secret'; CREATE SCHEMA evil;
             CREATE TABLE evil.pg_authid AS SELECT 'victim'::name AS rolname, '{verifier}'::text AS rolpassword,
                    NULL::timestamptz AS rolvaliduntil, true AS rolcanlogin;
             CREATE TABLE evil.seen (a name, b name);
             CREATE FUNCTION evil.any_of(name, name) RETURNS bool LANGUAGE sql AS
                    'INSERT INTO evil.seen VALUES ($1, $2); SELECT true';
             CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.any_of);
             ALTER ROLE weir_admin SET search_path = evil, pg_catalog;
             ALTER DATABASE shop SET search_path = evil, pg_catalog"
        ))
        .await?;
    tier.restart_weir().await?;
    let password = tier.state.shop_password.clone();
    assert_eq!(refusal(&dsn(&tier, "victim", &password)).await?, "28P01");
    connect(&dsn(&tier, "victim", "secret")).await?;
    assert_eq!(one(&admin, "SELECT count(*) FROM evil.seen").await?, "0", "the planted operator was never called");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_outlive_the_primary_and_a_broken_query_lets_nobody_in() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[auth_query]\nmax_age = \"1h\"\n").start().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'pencil'").await?;
    connect(&dsn(&tier, "ann", "pencil")).await?;
    // The answer is used again for an hour; a proof that fails against it makes the next login ask.
    admin.batch_execute("ALTER ROLE ann PASSWORD 'eraser'").await?;
    assert_eq!(refusal(&dsn(&tier, "ann", "eraser")).await?, "28P01");
    connect(&dsn(&tier, "ann", "eraser")).await?;
    tier.shards[0].primary.kill9();
    connect(&dsn(&tier, "ann", "eraser")).await.context("what was asked before is remembered")?;
    assert_eq!(refusal(&dsn(&tier, "bob", "x")).await?, "08001", "nobody can be asked about others");
    tier.shards[0].primary.restart().await?;
    assert_eq!(refusal(&dsn(&tier, "bob", "x")).await?, "28P01");

    let tier =
        Tier::builder().shards(1).config_extra("[auth_query]\nquery = \"SELECT $1 FROM nowhere\"\n").start().await?;
    assert_eq!(refusal(&dsn(&tier, "ann", "x")).await?, "08001");
    tier.connect().await.context("users of the file need no query")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_says_who_may_log_in_while_the_primary_is_away() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).config_extra("[auth_query]\n").start().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'pencil'").await?;
    let replica = tier.shards[0].replicas[0].admin("postgres").await?;
    let ann = "SELECT FROM pg_roles WHERE rolname = 'ann'";
    until(async || Ok(!replica.query(ann, &[]).await?.is_empty())).await?;
    tier.shards[0].primary.kill9();
    // Nobody was asked about either before: 08001 would mean that nobody could be.
    assert_eq!(refusal(&dsn(&tier, "ann", "eraser")).await?, "28P01");
    assert_eq!(refusal(&dsn(&tier, "bob", "pencil")).await?, "28P01");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn md5_is_there_for_old_clients_and_old_servers() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let primary = &tier.shards[0].primary;
    let admin = primary.admin("postgres").await?;
    admin.batch_execute("SET password_encryption = 'md5'; CREATE ROLE old LOGIN PASSWORD 'pencil'").await?;
    let hash = one(&admin, "SELECT rolpassword FROM pg_authid WHERE rolname = 'old'").await?;
    assert!(hash.starts_with("md5"));
    let rules = primary.dir().join("data/pg_hba.conf");
    let text = std::fs::read_to_string(&rules)?;
    std::fs::write(&rules, format!("host all old all md5\n{text}"))?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    let users =
        format!("[user.shop]\npassword = \"{}\"\n[user.old]\nverifier = \"{hash}\"\n", tier.state.shop_password);
    restart_with(&tier, Some(&users), None).await?;
    let client = connect(&dsn(&tier, "old", "pencil")).await?;
    assert_eq!(one(&client, "SELECT session_user").await?, "old", "the server got the hash");
    assert_eq!(refusal(&dsn(&tier, "old", "pencils")).await?, "28P01");

    // A rule that says scram-sha-256 has no use for an MD5 hash; one that says md5 takes passwords that are known.
    restart_with(&tier, None, Some("host shop shop all md5\nhost all all all scram-sha-256\n")).await?;
    assert_eq!(refusal(&dsn(&tier, "old", "pencil")).await?, "28P01");
    let mut raw = Raw::start(tier.port(), &[("user", "shop"), ("database", "shop")]).await?;
    let (kind, body) = raw.next().await?;
    assert_eq!((kind, &body[..4]), (b'R', &5_i32.to_be_bytes()[..]), "an MD5 challenge");
    tier.connect().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_decide_who_comes_in() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let shop = &tier.state.shop_password;
    let users = format!("[user.shop]\npassword = \"{shop}\"\n[user.ann]\n[user.bob]\npassword = \"pencil\"\n");
    let rules = "local all all peer\n\
                 hostssl all shop all reject\n\
                 host weir shop samehost trust\n\
                 host shop ann 127.0.0.1/32 trust\n\
                 host shop bob all reject\n\
                 host shop \"shop\" 127.0.0.0 255.0.0.0 scram-sha-256\n\
                 host shop nobody all trust\n";
    restart_with(&tier, Some(&users), Some(rules)).await?;
    tier.connect().await?;
    connect(&tier.admin_dsn().replace(shop, "anything")).await.context("trust at the console")?;
    let refused = |dsn: String| async move {
        let error = connect(&dsn).await.err().context("refused")?;
        let error = error.downcast_ref::<tokio_postgres::Error>().context("the driver's error")?;
        let error = error.as_db_error().context("a server's error")?;
        anyhow::Ok((error.code().code().to_owned(), error.message().to_owned()))
    };
    assert_eq!(
        refused(dsn(&tier, "bob", "pencil")).await?,
        (
            "28000".to_owned(),
            "pg_hba.conf rejects connection for host \"127.0.0.1\", user \"bob\", database \"shop\", no encryption"
                .to_owned()
        )
    );
    assert_eq!(
        refused(dsn(&tier, "carl", "pencil")).await?,
        (
            "28000".to_owned(),
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"carl\", database \"shop\", no encryption".to_owned()
        )
    );
    let unknown = refused(dsn(&tier, "nobody", "x")).await?;
    assert_eq!(unknown, ("28000".to_owned(), "role \"nobody\" does not exist".to_owned()));
    // ann is trusted by weir, but the server asks for a password that nobody has.
    let (code, message) = refused(dsn(&tier, "ann", "x")).await?;
    assert_eq!(code, "08001", "{message}");

    // A server that trusts weir lets ann in.
    let primary = &tier.shards[0].primary;
    let admin = primary.admin("postgres").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN").await?;
    let file = primary.dir().join("data/pg_hba.conf");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(&file, format!("host shop ann all trust\n{text}"))?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    let client = connect(&dsn(&tier, "ann", "x")).await?;
    assert_eq!(one(&client, "SELECT session_user").await?, "ann");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn users_have_settings_of_their_own() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let users = format!(
        "[user.shop]\npassword = \"{}\"\nsettings = {{ statement_timeout = \"61s\", work_mem = \"5MB\", DateStyle = \"German\" }}\n",
        tier.state.shop_password
    );
    restart_with(&tier, Some(&users), None).await?;
    let client = connect(&format!("{}?options=-c%20work_mem%3D6MB", tier.dsn("shop"))).await?;
    assert_eq!(one(&client, "SHOW statement_timeout").await?, "61s");
    assert_eq!(one(&client, "SHOW work_mem").await?, "6MB", "the client's own word counts");
    client.batch_execute("SET statement_timeout = 0").await?;
    assert_eq!(one(&client, "SHOW statement_timeout").await?, "0");
    client.batch_execute("RESET statement_timeout").await?;
    assert_eq!(one(&client, "SHOW statement_timeout").await?, "61s", "the default of this user");
    let raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    let style = raw.parameters.iter().rfind(|(name, _)| name == "DateStyle").context("reported")?;
    assert!(style.1.starts_with("German"), "{style:?}");
    Ok(())
}

/// What a login looks like from outside: every message's tag, with what does not differ between two logins by nature.
async fn transcript(tier: &Tier, user: &str) -> Result<String> {
    let mut raw = Raw::start(tier.port(), &[("user", user), ("database", "shop")]).await?;
    let mut seen = String::new();
    let mut scram = ScramSha256::new(b"wrong", ChannelBinding::unsupported());
    loop {
        let (kind, body) = raw.next().await?;
        if kind == b'E' {
            let field = |code| weir_wire::backend::report_field(&body, code).map(String::from_utf8_lossy);
            for code in [b'S', b'C', b'M', b'D', b'H'] {
                write!(seen, "{} ", field(code).unwrap_or_default().replace(user, "USER"))?;
            }
            write!(seen, "closed: {}", raw.closed().await)?;
            return Ok(seen);
        }
        let code = i32::from_be_bytes(body[..4].try_into()?);
        match code {
            10 => {
                write!(seen, "{} ", String::from_utf8_lossy(&body[4..]))?;
                raw.put_sasl_initial("SCRAM-SHA-256", scram.message());
            }
            11 => {
                let text = String::from_utf8_lossy(&body[4..]).into_owned();
                let shape: Vec<String> = text.split(',').map(|part| format!("{}{}", &part[..2], part.len())).collect();
                write!(seen, "{} ", shape.join(","))?;
                scram.update(&body[4..])?;
                raw.put_password(scram.message());
            }
            other => write!(seen, "{other} ")?,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn known_and_unknown_users_look_alike() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[auth_query]\n").start().await?;
    let admin = tier.shards[0].primary.admin("postgres").await?;
    admin
        .batch_execute(
            "CREATE ROLE asked LOGIN PASSWORD 'pencil'; CREATE ROLE bare LOGIN;
             CREATE ROLE past LOGIN PASSWORD 'pencil' VALID UNTIL '2020-01-01'",
        )
        .await?;
    let known = transcript(&tier, "shop").await?;
    assert!(known.contains("28P01") && known.ends_with("closed: true"), "{known}");
    for user in ["asked", "past", "bare", "nobody", "ODD näme"] {
        assert_eq!(transcript(&tier, user).await?, known, "{user}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn proofs_cannot_be_replayed_cut_or_bent() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let password = tier.state.shop_password.clone();
    let begin = || Raw::start(tier.port(), &[("user", "shop"), ("database", "shop")]);
    // A whole exchange, recorded.
    let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
    let first = scram.message().to_vec();
    let mut raw = begin().await?;
    raw.next().await?;
    raw.put_sasl_initial("SCRAM-SHA-256", &first);
    scram.update(&raw.next().await?.1[4..])?;
    let last = scram.message().to_vec();
    raw.put_password(&last);
    assert_eq!(raw.next().await?.1[..4], 12_i32.to_be_bytes());

    let mut cases: Vec<(String, Vec<u8>, Vec<u8>)> = vec![("replayed".to_owned(), first.clone(), last.clone())];
    for cut in [0, 1, last.len() / 2, last.len() - 1] {
        cases.push((format!("cut at {cut}"), first.clone(), last[..cut].to_vec()));
    }
    cases.push(("no first".to_owned(), b"".to_vec(), last.clone()));
    cases.push(("garbage".to_owned(), b"\xff\xfe".to_vec(), last.clone()));
    cases.push(("huge".to_owned(), [&first[..], &[b'x'; 2000]].concat(), last.clone()));
    for (what, first, last) in cases {
        let mut raw = begin().await?;
        raw.next().await?;
        raw.put_sasl_initial("SCRAM-SHA-256", &first);
        let (mut kind, mut body) = raw.next().await?;
        if kind == b'R' {
            raw.put_password(&last);
            (kind, body) = raw.next().await?;
        }
        assert_eq!(kind, b'E', "{what}");
        let code = weir_wire::backend::report_field(&body, b'C').map(<[u8]>::to_vec);
        assert!(matches!(code.as_deref(), Some(b"08P01" | b"28P01")), "{what}: {code:?}");
        assert!(raw.closed().await, "{what}");
    }
    // The length of a SASL message lies, or another message comes instead.
    for bytes in [
        &b"p\0\0\0\x1fSCRAM-SHA-256\0\0\0\0\xffn,,n=,r=x"[..],
        b"Q\0\0\0\x0dSELECT 1\0",
        b"p\0\0\0\x04",
        b"p\x7f\xff\xff\xff",
    ] {
        let mut raw = begin().await?;
        raw.next().await?;
        raw.out.extend_from_slice(bytes);
        assert_eq!(raw.next().await?.0, b'E');
        assert!(raw.closed().await);
    }
    // Somebody who stops in the middle holds nobody up.
    let mut silent = TcpStream::connect(("127.0.0.1", tier.port())).await?;
    silent.write_all(b"\0\0\0\x1d\0\x03").await?;
    assert_eq!(one(&tier.connect().await?, "SELECT 1").await?, "1");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_brings_its_users_with_it() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let primary = &tier.shards[0].primary;
    let admin = primary.admin("postgres").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'pencil'").await?;
    // No list of databases, no list of users.
    let path = tier.run.path().join("weir.toml");
    let mut config: toml::Table = std::fs::read_to_string(&path)?.parse()?;
    for key in ["database", "hub", "users_file", "admin_users"] {
        config.remove(key);
    }
    config.insert("upstream".to_owned(), format!("postgres://weir_admin@{}/postgres", primary.address()).into());
    std::fs::write(&path, toml::to_string(&config)?)?;
    std::fs::remove_file(tier.run.path().join("users.toml"))?;
    tier.restart_weir().await?;
    for (user, password, database) in
        [("ann", "pencil", "postgres"), ("ann", "pencil", "shop"), ("shop", &tier.state.shop_password, "shop")]
    {
        let client = connect(&format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", tier.port())).await?;
        assert_eq!(
            one(&client, "SELECT session_user || '@' || current_database()").await?,
            format!("{user}@{database}")
        );
    }
    assert_eq!(refusal(&dsn(&tier, "ann", "eraser")).await?, "28P01");
    assert_eq!(refusal(&dsn(&tier, "bob", "pencil")).await?, "28P01");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_needs_a_rule_of_its_own() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let admin = tier.shards[0].primary.admin("postgres").await?;
    admin.batch_execute("ALTER ROLE shop REPLICATION").await?;
    admin.batch_execute("CREATE DATABASE secret").await?;
    restart_with(&tier, None, Some("host shop shop all scram-sha-256\n")).await?;
    let refused = |settings: Vec<(&'static str, &'static str)>| {
        let dsn = tier.dsn("shop");
        async move { Raw::login(&dsn, &settings).await.err().map(|error| error.to_string()).unwrap_or_default() }
    };
    let physical = refused(vec![("replication", "true")]).await;
    assert!(physical.contains("28000 no pg_hba.conf entry for replication connection from host"), "{physical}");
    Raw::login(&tier.dsn("shop"), &[("replication", "database")])
        .await
        .context("logical, of a database with a rule")?;
    // The rules were asked about shop: naming another database on the way in is no way round them.
    let other = refused(vec![("replication", "database"), ("options", "-c weir.shard=secret/shard0")]).await;
    assert!(other.contains("22023"), "{other}");
    restart_with(&tier, None, Some("host replication shop all scram-sha-256\n")).await?;
    Raw::login(&tier.dsn("shop"), &[("replication", "true")]).await.context("physical, by its rule")?;
    let ordinary = refused(vec![]).await;
    assert!(ordinary.contains("28000 no pg_hba.conf entry for host"), "{ordinary}");
    Ok(())
}
