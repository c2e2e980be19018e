//! Configuration files as people write them: the shipped examples, typos, bad values, careless permissions.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::value::{Size, Time};
use super::*;
use crate::back::tls::ServerTlsMode;

const EXAMPLE: &str = include_str!("../../../../config/weir.toml");
const USERS: &str = include_str!("../../../../config/users.toml");

/// A directory with a weir.toml and the secrets it names; removed when dropped.
struct Files(PathBuf);

impl Files {
    fn new(config: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weir-config-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let files = Files(std::env::temp_dir().join(name));
        std::fs::create_dir(&files.0).expect("a fresh directory");
        files.write("weir.toml", config, 0o644);
        files.write("users.toml", USERS, 0o600);
        files.write("admin.pw", "s3cret-admin\n", 0o600);
        files.write("hub.dsn", "postgres://weir_admin:s3cret-hub@127.0.0.1:5441/weir_hub\n", 0o400);
        files.write("peers.secret", "s3cret-of-several-weirs\n", 0o600);
        files.write("server.key", "not a key", 0o640);
        files.write("pg_hba.conf", "host all all all scram-sha-256\n", 0o644);
        files.write("redis.pw", "s3cret-redis\n", 0o600);
        let signed = rcgen::generate_simple_self_signed(Vec::new()).expect("a certificate");
        files.write("redis-ca.crt", &signed.cert.pem(), 0o644);
        files.write("peers-ca.crt", &signed.cert.pem(), 0o644);
        files.write("peer.crt", &signed.cert.pem(), 0o644);
        files.write("peer.key", &signed.signing_key.serialize_pem(), 0o600);
        let pem = |what: &str| format!("-----BEGIN {what}-----\nAAAA\n-----END {what}-----\n");
        files.write("servers-ca.crt", &pem("CERTIFICATE"), 0o644);
        files.write("weir.crt", &pem("CERTIFICATE"), 0o644);
        files.write("weir.key", &pem("PRIVATE KEY"), 0o600);
        files
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.0.join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode set");
    }

    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(self.0.join("weir.toml"))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The example with one piece of it replaced.
fn edited(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "the example has no {from:?}");
    EXAMPLE.replacen(from, to, 1)
}

/// Error of the example after an edit, with the line's text that it points at.
fn refusal(from: &str, to: &str) -> (ConfigError, String) {
    let text = edited(from, to);
    let error = Files::new(&text).load().expect_err("refused");
    let line = error.line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default().to_owned();
    (error, line)
}

#[test]
fn the_example_says_every_default() {
    let files = Files::new(EXAMPLE);
    let config = files.load().expect("the example is valid");
    assert_eq!(config.database("shop").map(|shop| shop.shards.len()), Some(2));
    assert_eq!(config.admin_users, ["shop"]);
    assert_eq!(config.server_auth.password("anywhere", 5432, "shop"), Some("s3cret-admin"));
    assert_eq!(config.users_file, Some(files.0.join("users.toml")));
    let shop = config.database("shop").expect("declared");
    assert_eq!(shop.shards[0].primary.to_string(), "shard0.example.com:5432");
    let key = Placement::Sharded { key: "user_id".into(), key_type: weir_core::topology::KeyType::Int };
    assert_eq!(*shop.rules().placement("public", "orders"), key);
    assert_eq!(*shop.rules().placement("public", "products"), Placement::Reference);

    // What the example shows as a default must be the default.
    let bare: String = EXAMPLE.split("\n[pool]").next().expect("text").to_owned();
    let bare = Files::new(&bare).load().expect("the optional sections are optional");
    assert_eq!(bare.pool, config.pool);
    assert_eq!(bare.limits, config.limits);
    assert_eq!(bare.log, config.log);
    let cache = |config: &Config| CacheConfig { redis: None, ..config.cache.clone() };
    assert_eq!(cache(&bare), cache(&config));
    assert!(bare.tls.is_none() && bare.cache.redis.is_none());
}

/// The example with everything in force that it shows as a comment.
fn uncommented() -> String {
    let is_key = |line: &str| {
        let Some(line) = line.strip_prefix("# ") else { return false };
        line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
    };
    EXAMPLE.lines().map(|line| if is_key(line) { &line[2..] } else { line }).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_the_example_shows_as_a_comment_is_valid() {
    let config = Files::new(&uncommented()).load().expect("valid");
    let any = config.wildcard.expect("an upstream");
    assert_eq!((any.shards.len(), any.shards[0].replicas.len(), &*any.server_database), (2, 1, "postgres"));
    let pool = |database, user| {
        let pool = Config::pool_of(&config_of(&uncommented()), database, user);
        (pool.size, pool.min, pool.reserve, pool.mode.as_str())
    };
    assert_eq!(pool("shop", "shop"), (10, 2, 5, "session"), "the database's");
    assert_eq!(pool("shop", "metrics"), (2, 0, 0, "session"), "the user's wins");
    assert_eq!(pool("elsewhere", "shop"), (20, 0, 0, "transaction"));
    let config = config_of(&uncommented());
    let peers = config.peers.clone().expect("a section");
    assert_eq!(peers.listen.to_string(), "0.0.0.0:6433");
    assert_eq!(peers.advertise.as_deref(), Some("weir-1.example.com:6433"));
    assert_eq!((peers.secret.expose(), peers.lease), ("s3cret-of-several-weirs", Duration::from_secs(1)));
    let redis = config.cache.redis.as_ref().expect("one");
    assert_eq!(
        (redis.user.as_deref(), redis.password.as_ref().map(Secret::expose)),
        (Some("weir"), Some("s3cret-redis"))
    );
    assert!(redis.authorities.is_some() && redis.identity.is_some());
    assert_eq!(peers.mode, PeersMode::Leased);
    assert_eq!((config.user_connections_max("metrics"), config.user_connections_max("shop")), (Some(5), Some(100)));
    assert_eq!(config.database_connections_max("shop"), Some(500));
    assert_eq!(config.limits.shortest_time_out(), Some(Duration::from_secs(60)));
}

fn config_of(text: &str) -> Config {
    Files::new(text).load().expect("valid")
}

#[test]
fn the_command_line_wins_and_needs_no_file() {
    let files = Files::new("listen = \"127.0.0.1:1\"\nusers_file = \"users.toml\"\nupstream = \"postgres://a@one\"");
    let path = files.0.join("weir.toml");
    let of = |flags: &Flags| Config::load_with(Some(&path), flags);
    let config = of(&Flags::default()).expect("valid");
    assert_eq!((config.listen.port(), config.http_listen.port(), &*config.server_auth.user), (1, 9187, "a"));
    let flags = Flags {
        upstream: Some(Secret::new("postgres://b:p%40ss@two:5433/own")),
        replicas: vec![Secret::new("three"), Secret::new("[::1]:5434")],
        shards: vec![Secret::new("host=four port=5435")],
        listen: Some(([127, 0, 0, 1], 2).into()),
        ..Flags::default()
    };
    let config = of(&flags).expect("valid");
    let any = config.wildcard.expect("an upstream");
    let replicas: Vec<String> = any.shards[0].replicas.iter().map(ToString::to_string).collect();
    assert_eq!((config.listen.port(), any.shards[0].primary.to_string()), (2, "two:5433".to_owned()));
    assert_eq!(
        (replicas, any.shards[1].primary.to_string()),
        (vec!["three:5432".into(), "[::1]:5434".into()], "four:5435".into())
    );
    assert_eq!((&*config.server_auth.user, config.server_auth.password("h", 5432, "postgres")), ("b", Some("p@ss")));
    let made = config.hub.expect("made");
    let hub: tokio_postgres::Config = made.dsn.expose().parse().expect("a DSN");
    assert_eq!((hub.get_dbname(), made.password.as_ref().map(Secret::expose)), (Some("weir"), Some("p@ss")));
    assert!(config.auth_query.is_some(), "its users come with it");
    assert_eq!((config.admin_users, config.server_auth.tls.mode()), (vec!["b".to_owned()], ServerTlsMode::Prefer));
    let tls =
        Flags { upstream: Some(Secret::new("postgres://b:p%40ss@two:5433/own?sslmode=require")), ..flags.clone() };
    let alone = Config::load_with(None, &tls).expect("no file is needed");
    assert_eq!((alone.users.len(), alone.server_auth.tls.mode()), (0, ServerTlsMode::Require));
    assert_eq!(flags.given(), ["--upstream", "--replica", "--shard", "--listen"]);
    for (replica, message) in [
        ("two:5433", "used twice"),
        ("postgres://c@five", "another user"),
        ("host=a,b", "several hosts"),
        ("postgres://b:wr0ng@five", "another user or password"),
        ("port=x", "not a Postgres connection string"),
        ("host=/tmp", "TCP only"),
    ] {
        let error =
            of(&Flags { replicas: vec![Secret::new(replica)], ..flags.clone() }).expect_err(replica).to_string();
        assert!(error.contains(message) && error.contains("--replica"), "{error}");
        assert!(!error.contains("wr0ng"), "{error}");
    }
}

#[test]
fn secrets_are_never_printed() {
    let config = Files::new(EXAMPLE).load().expect("valid");
    let printed = format!("{config:?} {}", config.hub.as_ref().expect("hub").dsn);
    assert!(!printed.contains("s3cret") && !printed.contains("change-me"), "{printed}");
    assert!(printed.contains("***"));
    let text = edited("dsn_file = \"hub.dsn\"", "dsn = \"postgres://u:s3cret@h:port/x\"");
    let error = Files::new(&text).load().expect_err("a bad port").to_string();
    assert!(!error.contains("s3cret"), "{error}");
}

#[test]
fn a_typo_names_its_line_and_the_nearest_key() {
    for (from, to, near) in [
        ("wait_queue_max", "wait_queue_mx", "wait_queue_max"),
        ("server_database =", "server_databse =", "server_database"),
        ("http_listen", "http_lsten", "http_listen"),
        ("replicas = [\"shard0", "replica = [\"shard0", "replicas"),
        ("[limits]", "[limit]", "limits"),
        ("l1_bytes", "l1bytes", "l1_bytes"),
    ] {
        let (error, line) = refusal(from, to);
        assert_eq!(error.hint, Some(format!("did you mean `{near}`?")), "{error}");
        assert!(line.contains(to.trim_end_matches(" = ")), "{error} points at {line:?}");
    }
    let (error, _) = refusal("size = 20", "zzzzzzzzz = 20");
    assert!(error.hint.expect("a list").starts_with("known keys here: size, min"));
}

#[test]
fn bad_values_name_their_line() {
    for (from, to, message) in [
        ("# server_ca = \"/etc/ssl/servers-ca.crt\"", "server_ca = \"ca.crt\"", "a file of the hub's server"),
        (
            "# replicas = [\"hub-replica.example.com:5432\"]",
            "replicas = [\"a.example.com:5432\", \"a.example.com:5432\"]",
            "used twice",
        ),
        ("wait_max = \"5s\"", "wait_max = \"5 parsecs\"", "is not a duration"),
        ("wait_max = \"5s\"", "wait_max = 5", "expected a duration such as"),
        ("wait_max = \"5s\"", "wait_max = \"0s\"", "more than 0"),
        ("l1_bytes = \"64MiB\"", "l1_bytes = \"64MB\"", "is not a size"),
        ("entry_bytes_max = \"256KiB\"", "entry_bytes_max = \"1GiB\"", "more than l1_bytes"),
        ("listen = \"0.0.0.0:6432\"", "listen = \"everywhere\"", "not an address"),
        ("primary = \"shard1.example.com:5432\"", "primary = \"shard1.example.com\"", "not host:port"),
        ("primary = \"shard1.example.com:5432\"", "primary = \"shard0.example.com:5432\"", "used twice"),
        ("name = \"shard1\"", "name = \"shard0\"", "used twice"),
        ("home = \"shard0\"", "home = \"shard9\"", "unknown shard"),
        ("weight = 1 ", "weight = 0 ", "between 1 and 1000"),
        ("size = 20", "size = 0", "between 1 and"),
        ("min = 0 ", "min = 21 ", "more than size"),
        ("mode = \"transaction\"", "mode = \"transactional\"", "unknown pool mode"),
        ("connections_max = 5 ", "connections_max = 0 ", "between 1 and"),
        ("freshness = \"strict\"", "freshness = \"lag <= 5\"", "unknown freshness level"),
        ("freshness = \"strict\"", "freshness = \"strikt\"", "unknown freshness level"),
        ("replica_wait_max = \"5ms\"", "replica_wait_max = \"2s\"", "more than 1s"),
        ("type = \"bigint\"", "type = \"money\"", "unknown key type"),
        ("kind = \"reference\"", "kind = \"reference\"\nkey = \"x\"", "neither key nor type"),
        ("kind = \"sharded\"", "kind = \"shraded\"", "unknown kind"),
        ("kind = \"global\"", "kind = \"global\"\ncache = \"nevre\"", "unknown cache policy"),
        ("kind = \"global\"", "kind = \"global\"\ncache = { stale_while_revalidate = \"2h\" }", "at most 1h"),
        ("kind = \"reference\"", "kind = \"reference\"\nglobal_unique = [\"sku\"]", "has no global_unique"),
        ("# global_unique = [\"email\"]", "global_unique = [\"user_id\"]", "equal keys meet on one shard"),
        ("# global_unique = [\"email\"]", "global_unique = [\"a, b\"]", "single columns"),
        ("# global_unique = [\"email\"]", "global_unique = [\"email\", \"email\"]", "named twice"),
        ("name = \"orders\"", "name = \"public.orders\"", "no dot"),
        ("name = \"orders\"", "name = \"users\"", "declared twice"),
        ("admin_users = [\"shop\"]", "admin_users = [\"shpo\"]", "unknown user"),
        ("redis = \"rediss://", "redis = \"http://", "not a Redis URL"),
        ("# redis_ca = \"redis-ca.crt\"", "redis_ca = \"servers-ca.crt\"", "certificates for Redis"),
        ("# redis_ca = \"redis-ca.crt\"", "redis_ca = \"users.toml\"", "no PEM certificate"),
        ("# redis_key", "redis_key", "both redis_certificate and redis_key"),
        ("# redis_user = \"weir\" ", "redis_env = \"NOT_SET\" ", "takes one of redis,"),
        ("password_file = \"admin.pw\"", "password_file = \"nowhere.pw\"", "nowhere.pw"),
        ("mode = \"allow\"", "mode = \"alow\"", "unknown TLS mode"),
        ("level = \"info\"", "level = \"loud\"", "unknown log level"),
        ("[database.shop]", "[database.weir]", "admin console"),
    ] {
        let (error, line) = refusal(from, to);
        assert!(error.to_string().contains(message), "{to}: {error}");
        let pointed = to.lines().any(|part| line.contains(part.trim_end()));
        assert!(pointed || line.starts_with("[[database") || line.starts_with("name ="), "{error} points at {line:?}");
        assert!(error.line.is_some(), "{error}");
    }
}

#[test]
fn users_are_known_by_password_or_verifier() {
    let load = |users: &str| {
        let files = Files::new(EXAMPLE);
        files.write("users.toml", &format!("{USERS}\n{users}"), 0o600);
        files.load()
    };
    let md5 = "md5d41d8cd98f00b204e9800998ecf8427e";
    let config = load(&format!("[user.old]\nverifier = \"{md5}\"\n[user.cert]")).expect("valid");
    assert!(matches!(config.users.get("old").map(|user| &user.proof), Some(Proof::Stored(_))));
    assert!(matches!(config.users.get("cert").map(|user| &user.proof), Some(Proof::Elsewhere)));
    let shop = config.users.get("shop").expect("in the example");
    assert_eq!(shop.settings.get("statement_timeout"), Some("'60s'"));
    assert_eq!(shop.settings.get("search_path"), Some("\"public\""));
    assert!(!format!("{config:?}").contains("d41d8"));
    for (users, says) in [
        ("[user.x]\npassword = \"\"", "empty password"),
        ("[user.x]\nverifier = \"s3cret\"", "cannot be read"),
        ("[user.x]\npassword = \"a\"\nverifier = \"md5d41d8cd98f00b204e9800998ecf8427e\"", "both"),
        ("[user.x]\npasword = \"a\"", "did you mean `password`"),
        ("[user.x]\nsettings = { \"a;b\" = 1 }", "not the name of a setting"),
        ("[user.x]\nsettings = { options = \"-c a=b\" }", "not the name of a setting"),
        ("[user.x]\nsettings = { work_mem = [1] }", "one value"),
        ("[user.x]\nsettings = { search_path = \"a,,b\" }", "search_path"),
    ] {
        let error = load(users).expect_err(users);
        assert!(error.to_string().contains(says) && !error.to_string().contains("s3cret"), "{error}");
        assert!(error.line.is_some_and(|line| line > USERS.lines().count()), "{error}");
    }
}

#[test]
fn hba_rules_are_checked_with_their_line() {
    let text = edited("# hba_file = ", "hba_file = ");
    let load = |rules: &str| {
        let files = Files::new(&text);
        files.write("pg_hba.conf", rules, 0o644);
        files.load()
    };
    load("local all all peer\nhost all all 10.0.0.0/8 scram-sha-256\n").expect("valid");
    let error = load("# one\nhost all all all ldap\n").expect_err("refused").to_string();
    assert!(error.contains("pg_hba.conf:2: method `ldap` is not supported (weir knows"), "{error}");
    let error = load("hostssl all all all cert\n").expect_err("refused").to_string();
    assert!(error.contains("pg_hba.conf:1:") && error.contains("client_ca"), "{error}");
    let error = Files::new(&edited("# hba_file = \"pg_hba.conf\"", "hba_file = \"nowhere.conf\"")).load();
    let error = error.expect_err("no file").to_string();
    assert!(error.contains("nowhere.conf: cannot read it"), "{error}");
}

#[test]
fn auth_query_makes_the_users_file_optional() {
    let text = |part: &str| edited("\n[pool]\n", &format!("\n{part}\n[pool]\n"));
    let config =
        Files::new(&text("[auth_query]").replacen("users_file = ", "# users_file = ", 1)).load().expect("valid");
    let query = config.auth_query.expect("configured");
    assert_eq!((query.database, query.max_age), (None, Duration::ZERO));
    assert!(
        query.sql.contains("pg_catalog.pg_authid") && EXAMPLE.contains(&query.sql),
        "the example shows the default"
    );
    for (part, says) in [
        ("[auth_query]\ndatabase = \"shpo\"", "did you mean `shop`"),
        ("[auth_query]\nquery = \"SELECT 1\"", "does not use $1"),
        ("[auth_query]\nmax_age = \"2h\"", "more than 1h"),
        ("[server_tls2]", "unknown key"),
    ] {
        let error = Files::new(&text(part)).load().expect_err(part).to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = Files::new(&EXAMPLE.replacen("users_file = ", "# users_file = ", 1)).load().expect_err("nobody");
    assert!(error.to_string().contains("nobody could log in"), "{error}");
}

#[test]
fn server_tls_says_what_it_lacks() {
    for (to, says) in [
        ("mode = \"verify-full\"", "needs `ca`"),
        ("mode = \"require\"\nca = \"server.key\"", "no PEM certificate"),
        ("mode = \"require\"\nkey = \"server.key\"", "both certificate and key"),
        ("mode = \"full\"", "unknown TLS mode"),
        ("ca = \"nowhere.crt\"", "nowhere.crt"),
    ] {
        let error = Files::new(&edited("mode = \"disable\"", to)).load().expect_err(to).to_string();
        assert!(error.contains(says) && error.contains("weir.toml:"), "{error}");
    }
    let config = Files::new(&edited("mode = \"disable\"", "mode = \"require\"")).load().expect("valid");
    assert_eq!(config.server_auth.tls.mode(), crate::back::tls::ServerTlsMode::Require);
}

#[test]
fn peers_must_be_reachable_and_share_a_secret() {
    for (from, to, says) in [
        ("advertise = \"weir-1.example.com:6433\"", "", "no address that others could connect to"),
        (
            "advertise = \"weir-1.example.com:6433\"",
            "advertise_env = \"NO_SUCH_VARIABLE\"",
            "`NO_SUCH_VARIABLE` is not set",
        ),
        ("advertise = ", "advertise_env = \"PATH\"\nadvertise = ", "not both"),
        ("secret_file = \"peers.secret\"", "", "needs one of secret_file, secret_env"),
        ("secret_file = \"peers.secret\"", "secret_file = \"admin.pw\"", "less than 16 bytes"),
        ("lease = \"1s\"", "lease = \"10ms\"", "lease must be from"),
        ("mode = \"leased\"", "mode = \"pushed\"", "unknown mode of peers"),
        ("mode = \"leased\"", "mode = \"checked\"", "is not supported"),
        ("key = \"peer.key\"", "", "needs all of ca, certificate and key"),
        ("certificate = \"peer.crt\"", "certificate = \"weir.crt\"", "do not fit each other"),
        ("zone = \"eu-1a\"", "zone = \"eu-1a\"\nzone_env = \"PATH\"", "say zone or zone_env"),
        ("-replica.example.com:5432\" = \"eu-1a\"", "\" = \"eu-1a\"", "is not host:port"),
    ] {
        let text = uncommented();
        assert!(text.contains(from), "{from}");
        let error = Files::new(&text.replacen(from, to, 1)).load().expect_err(to).to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn passwords_come_from_a_passfile() {
    let files = Files::new(&edited("password_file = \"admin.pw\"", "passfile = \"pgpass\"").replacen(
        "dsn_file = \"hub.dsn\"",
        "dsn = \"postgres://weir_admin@hub.example.com:5441/weir_hub\"",
        1,
    ));
    files.write("pgpass", "hub.example.com:5441:weir_hub:weir_admin:s3cret-h\n*:*:*:weir_admin:s3cret-a\n", 0o600);
    let config = files.load().expect("valid");
    assert_eq!(config.server_auth.password("db", 5432, "shop"), Some("s3cret-a"));
    assert_eq!(config.hub.as_ref().and_then(|hub| hub.password.as_ref()).map(Secret::expose), Some("s3cret-h"));
    assert!(!format!("{config:?}").contains("s3cret"));
    files.write("pgpass", "*:*:*:*:x\n", 0o644);
    assert!(files.load().expect_err("readable by all").to_string().contains("chmod"));
}

#[test]
fn shared_secrets_are_refused() {
    for (name, mode) in [("admin.pw", 0o644), ("users.toml", 0o640), ("hub.dsn", 0o604), ("server.key", 0o644)] {
        let files = Files::new(EXAMPLE);
        let path = files.0.join(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode set");
        let error = files.load().expect_err("refused").to_string();
        assert!(error.contains(name) && error.contains("chmod"), "{error}");
    }
}

#[test]
fn many_shards_need_a_hub_and_one_does_not() {
    let hub = "[hub]\n# Exactly one of dsn, dsn_file (mode 0600), dsn_env (name of an environment variable).\ndsn_file = \"hub.dsn\"";
    let (error, _) = refusal(hub, "");
    assert!(error.to_string().contains("there is no [hub]"), "{error}");
    let single = "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\nusers_file = \"users.toml\"\n\
                  [database.a]\n[[database.a.shard]]\nname = \"only\"\nprimary = \"[::1]:5432\"\n\
                  [server_auth]\nuser = \"u\"\npassword_file = \"admin.pw\"\n";
    let config = Files::new(single).load().expect("no hub needed");
    assert!(config.hub.is_none());
    assert_eq!(config.databases[0].shards[0].primary.to_string(), "[::1]:5432");
    assert_eq!(config.databases[0].server_database, "a");
}

#[test]
fn check_sums_up_a_file() {
    let files = Files::new(EXAMPLE);
    let summary = check(files.0.join("weir.toml")).expect("valid");
    assert!(
        summary.contains(
            "database shop: 2 shard(s), 2 replica(s), 2 sharded, 1 reference, 1 global table(s), home shard0"
        ),
        "{summary}"
    );
    let missing = check(files.0.join("none.toml")).expect_err("no such file").to_string();
    assert!(missing.contains("none.toml: cannot read it"), "{missing}");
}

#[test]
fn units_are_exact() {
    assert_eq!(Time::parse("500ms"), Some(Time(Duration::from_millis(500))));
    assert_eq!(Time::parse("2h"), Some(Time(Duration::from_secs(7200))));
    assert_eq!(Size::parse("3 KiB"), Some(Size(3072)));
    for bad in ["", "s", "5", "-5s", "5S", "1.5s", "99999999999999999999s", "18446744073709551615d"] {
        assert_eq!(Time::parse(bad), None, "{bad}");
    }
    assert_eq!(Size::parse("64mb"), None);
}

#[test]
fn two_databases_may_not_be_one_on_the_server() {
    let second = "[database.copy]\nserver_database = \"shop\"\n[[database.copy.shard]]\nname = \"s\"\n\
                  primary = \"shard1-replica.example.com:5432\"\n\n[database.shop]\n";
    let twice = edited("[database.shop]\n", second);
    let error = Files::new(&twice).load().expect_err("neither would know of the other's writes").to_string();
    assert!(error.contains("`shop`") && error.contains("`copy`") && error.contains("are one on the server"), "{error}");
    for (from, to) in [
        ("other_weirs = \"check\"", "other_weirs = \"ignore\""),
        ("server_database = \"shop\"\n[[database.copy", "server_database = \"copy\"\n[[database.copy"),
        ("\"shard1-replica.example.com:5432\"\n\n", "\"elsewhere.example.com:5432\"\n\n"),
    ] {
        assert!(twice.contains(from), "{from}");
        Files::new(&twice.replacen(from, to, 1)).load().expect("nothing is wrong with it");
    }
    // The wildcard would serve it under its own name as well.
    let any = edited(
        "[database.shop]\n",
        "[database.\"*\"]\n[[database.\"*\".shard]]\nname = \"s\"\nprimary = \"shard0.example.com:5432\"\n\n[database.shop]\n",
    );
    Files::new(&any).load().expect("`shop` is named");
    let other = any.replacen("server_database = \"shop\"", "server_database = \"shop2\"", 1);
    let error = Files::new(&other).load().expect_err("the wildcard serves shop2").to_string();
    assert!(error.contains("`shop` and `*`"), "{error}");
}
