//! docker-compose.yml and what it names, checked against the repository: images, ports, volumes, environment, configs.
//!
//! Invariant: nothing the tier in containers refers to may drift from the tree: a renamed port, script, table or variable
//! fails here. Non-goal: running containers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_yaml_ng::Value;

/// Images that are not built here, each with a fixed tag.
const IMAGES: &[&str] = &[
    "postgres:15-bookworm",
    "redis:7-bookworm",
    "haproxy:2.8-bookworm",
    "prom/prometheus:v2.53.2",
    "rust:1-bookworm",
    "debian:bookworm-slim",
];

const HAPROXY: &str = "config/haproxy/haproxy.cfg";

/// Environment of the official Postgres image (its docker-entrypoint.sh).
const POSTGRES_IMAGE_ENV: &[&str] = &["POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB", "POSTGRES_INITDB_ARGS"];

#[test]
fn images_are_known_or_built_here() {
    let compose = Compose::load();
    let mut built = BTreeSet::new();
    for (name, service) in &compose.services {
        if let Some(build) = service.get("build") {
            assert_eq!(text(&build["context"]), ".", "{name}: Dockerfiles copy from the repository root");
            let exposed = check_dockerfile(text(&build["dockerfile"]));
            assert_eq!(
                exposed,
                compose.listens(name).into_iter().collect(),
                "{name}: EXPOSE differs from where it listens"
            );
            built.insert(text(&service["image"]).to_owned());
        }
    }
    for (name, service) in &compose.services {
        let image = text(&service["image"]);
        assert!(
            IMAGES.contains(&image) || built.contains(image),
            "{name}: image {image} is neither known nor built here"
        );
        assert!(!image.ends_with(":latest") && image.contains(':'), "{name}: image {image} has no fixed tag");
    }
}

/// Base images, copied files, built packages and the user of one Dockerfile; gives the ports that it exposes.
fn check_dockerfile(path: &str) -> BTreeSet<u16> {
    let members = toml(Path::new("Cargo.toml"))["workspace"]["members"].clone();
    let packages: BTreeSet<String> = members
        .as_array()
        .expect("members")
        .iter()
        .map(|member| {
            let manifest = toml(&Path::new(member.as_str().expect("a path")).join("Cargo.toml"));
            manifest["package"]["name"].as_str().expect("a name").to_owned()
        })
        .collect();
    let mut user = None;
    let mut stages = BTreeSet::new();
    let mut exposed = BTreeSet::new();
    for line in read(path).lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["FROM", image, rest @ ..] => {
                assert!(IMAGES.contains(image), "{path}: unknown base image {image}");
                user = None;
                if let ["AS", stage] = rest {
                    stages.insert((*stage).to_owned());
                }
            }
            ["COPY", from, _, _] if from.starts_with("--from=") => {
                let stage = from.trim_start_matches("--from=");
                assert!(stages.contains(stage), "{path}: copies from unknown stage {stage}");
            }
            ["COPY", sources @ .., _] => {
                for source in sources {
                    assert!(root().join(source).exists(), "{path}: copies {source}, which does not exist");
                }
            }
            ["RUN", "cargo", "build", flags @ ..] => {
                let package = flags.iter().skip_while(|flag| **flag != "-p").nth(1).expect("cargo build -p PACKAGE");
                assert!(packages.contains(*package), "{path}: builds {package}, which is not a package here");
            }
            ["USER", name] => user = Some((*name).to_owned()),
            ["EXPOSE", ports @ ..] => exposed.extend(ports.iter().map(|port| port.parse::<u16>().expect("a port"))),
            _ => {}
        }
    }
    assert!(user.is_some_and(|user| user != "root"), "{path}: the last stage must run as a user of its own");
    exposed
}

#[test]
fn published_ports_do_not_clash_and_are_listened_on() {
    let compose = Compose::load();
    let mut published = BTreeMap::new();
    for (name, service) in &compose.services {
        for port in list(service.get("ports")) {
            let parts: Vec<&str> = port.split(':').collect();
            let [host, outside, inside] = parts.as_slice() else {
                panic!("{name}: port {port} must be ADDRESS:OUTSIDE:INSIDE")
            };
            assert_eq!(*host, "127.0.0.1", "{name}: an example publishes on the loopback only");
            if let Some(other) = published.insert((*outside).to_owned(), name) {
                panic!("{name} and {other} both publish port {outside}");
            }
            assert!(
                compose.listens(name).contains(&inside.parse().expect("a port")),
                "{name}: nothing listens on {inside}"
            );
        }
    }
    assert!(
        published.contains_key("6432") && published.contains_key("8080"),
        "weir and the storefront must be reachable"
    );
}

#[test]
fn mounted_files_exist_and_named_volumes_are_declared() {
    let compose = Compose::load();
    let declared: BTreeSet<&str> = keys(&compose.document["volumes"]).collect();
    let mut used = BTreeSet::new();
    for (name, service) in &compose.services {
        for volume in list(service.get("volumes")) {
            let (source, target) = volume.split_once(':').expect("SOURCE:TARGET");
            assert!(target.starts_with('/'), "{name}: {target} is not absolute");
            if let Some(path) = source.strip_prefix("./") {
                let found = root().join(path);
                assert!(found.is_file(), "{name}: {path} is not a file of this repository");
                assert!(target.ends_with(":ro"), "{name}: {path} must be mounted read-only");
                if Path::new(path).extension().is_some_and(|extension| extension == "sh") {
                    assert!(is_executable(&found), "{name}: {path} is not executable");
                }
            } else {
                assert!(declared.contains(source), "{name}: volume {source} is not declared");
                used.insert(source);
            }
        }
    }
    assert_eq!(used, declared, "declared volumes and used volumes differ");
}

#[test]
fn entry_points_and_commands_name_mounted_files() {
    let compose = Compose::load();
    for (name, service) in &compose.services {
        let targets: Vec<&str> = list(service.get("volumes")).filter_map(|volume| volume.split(':').nth(1)).collect();
        let words = list(service.get("entrypoint")).chain(list(service.get("command")));
        for word in words {
            let path = word.rsplit('=').next().unwrap_or(word);
            if path.starts_with('/') {
                assert!(targets.contains(&path), "{name}: {path} is not mounted");
            }
        }
    }
}

#[test]
fn environment_keys_are_read_by_what_they_are_given_to() {
    let compose = Compose::load();
    let weir_config = read("config/docker/weir.toml");
    for (name, service) in &compose.services {
        let image = text(&service["image"]);
        let mut readers: String = list(service.get("volumes"))
            .filter_map(|volume| volume.split(':').next()?.strip_prefix("./"))
            .filter(|path| Path::new(path).extension().is_some_and(|extension| extension == "sh"))
            .map(read)
            .collect();
        match image {
            "weir:local" => readers.push_str(&[weir_config.as_str(), &read("docker/weir/entrypoint.sh")].concat()),
            "storefront:local" => readers.push_str(&sources("storefront/src")),
            _ => {}
        }
        let given =
            service.get("environment").map(|environment| keys(environment).collect::<Vec<_>>()).unwrap_or_default();
        for key in given {
            let of_image = image.starts_with("postgres:") && POSTGRES_IMAGE_ENV.contains(&key);
            assert!(of_image || has_word(&readers, key), "{name}: nothing in it reads {key}");
        }
    }
    let weirs: Vec<&str> = compose.weirs().collect();
    assert!(weirs.len() > 1, "the cache of several weirs is what there is to see");
    for (key, name) in ["WEIR_SERVER_PASSWORD", "WEIR_HUB_DSN", "WEIR_PEERS_SECRET", "WEIR_ADVERTISE"]
        .into_iter()
        .flat_map(|key| weirs.iter().map(move |name| (key, name)))
    {
        let given = compose.services[*name]["environment"].get(key);
        assert!(given.is_some(), "config/docker/weir.toml reads {key}, which {name} is not given");
        if key == "WEIR_ADVERTISE" {
            compose.check_endpoint(text(&compose.services[*name]["environment"][key]), name);
        }
    }
}

#[test]
fn secrets_have_no_default_and_are_listed_in_the_example() {
    let compose = read("docker-compose.yml");
    let example = read("docker/example.env");
    let listed: BTreeSet<&str> = example
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| {
            assert_eq!(value, "", "{key}: an example secret would be used as one");
            key
        })
        .collect();
    let mut asked = BTreeSet::new();
    for rest in compose.split("${").skip(1) {
        let inside = rest.split_once('}').expect("closed").0;
        let (key, message) =
            inside.split_once(":?").unwrap_or_else(|| panic!("${{{inside}}} must refuse to be empty (:?)"));
        assert!(!message.is_empty(), "{key}: say where to set it");
        asked.insert(key);
    }
    assert_eq!(asked, listed, "variables of docker-compose.yml and docker/example.env differ");
}

#[test]
fn services_wait_for_services_that_exist_and_can_be_healthy() {
    let compose = Compose::load();
    for (name, service) in &compose.services {
        let Some(dependencies) = service.get("depends_on") else { continue };
        for dependency in keys(dependencies) {
            let other =
                compose.services.get(dependency).unwrap_or_else(|| panic!("{name} waits for unknown {dependency}"));
            assert_eq!(text(&dependencies[dependency]["condition"]), "service_healthy", "{name} → {dependency}");
            assert!(other.get("healthcheck").is_some(), "{name} waits for {dependency}, which has no health check");
            let shared =
                list(other.get("networks")).any(|network| list(service.get("networks")).any(|mine| mine == network));
            assert!(shared, "{name} waits for {dependency} but shares no network with it");
        }
    }
    let declared: BTreeSet<&str> = keys(&compose.document["networks"]).collect();
    let used: BTreeSet<&str> = compose.services.values().flat_map(|service| list(service.get("networks"))).collect();
    assert_eq!(used, declared, "declared networks and used networks differ");
}

#[test]
fn health_checks_ask_ports_that_are_listened_on() {
    let compose = Compose::load();
    for (name, service) in &compose.services {
        let Some(check) = service.get("healthcheck") else { continue };
        let words: Vec<&str> = list(check.get("test")).collect();
        if let ["CMD", "healthcheck", port, path] = words.as_slice() {
            assert!(
                compose.listens(name).contains(&port.parse().expect("a port")),
                "{name}: nothing listens on {port}"
            );
            let code = sources(if image_of(service) == "weir:local" { "proxy/server/src" } else { "storefront/src" });
            assert!(code.contains(&format!("\"{path}\"")), "{name}: no route {path} in its source");
        }
    }
}

#[test]
fn the_weir_config_matches_the_services_and_the_shop() {
    let compose = Compose::load();
    let config = toml(Path::new("config/docker/weir.toml"));
    let known = toml(Path::new("config/weir.toml"));
    for key in paths(&config) {
        // dsn_env and password_env stand in for the file variants that the full example shows.
        let shown =
            paths(&known).contains(&key) || read("config/weir.toml").contains(key.rsplit('.').next().unwrap_or(&key));
        assert!(shown, "config/docker/weir.toml: {key} is not in config/weir.toml");
    }
    let shop = &config["database"]["shop"];
    for shard in shop["shard"].as_array().expect("shards") {
        compose.check_endpoint(shard["primary"].as_str().expect("primary"), shard["name"].as_str().expect("name"));
        for replica in shard["replicas"].as_array().expect("replicas") {
            let endpoint = replica.as_str().expect("an endpoint");
            let service = endpoint.split(':').next().unwrap_or_default();
            compose.check_endpoint(endpoint, service);
            let follows = text(&compose.services[service]["environment"]["PRIMARY_HOST"]);
            assert_eq!(Some(follows), shard["name"].as_str(), "{service} follows another shard");
        }
    }
    let redis = config["cache"]["redis"].as_str().expect("redis");
    compose.check_endpoint(redis.trim_start_matches("redis://"), "redis");
    let declared: BTreeSet<&str> =
        shop["table"].as_array().expect("tables").iter().filter_map(|table| table["name"].as_str()).collect();
    let schema = read("storefront/src/store/schema.sql");
    let created: BTreeSet<&str> = schema
        .split("CREATE TABLE IF NOT EXISTS ")
        .skip(1)
        .filter_map(|rest| rest.split(['(', ' ', '\n']).next())
        .collect();
    assert_eq!(declared, created, "declared tables and the storefront's tables differ");
}

#[test]
fn prometheus_scrapes_services_where_they_listen() {
    let compose = Compose::load();
    let config: Value = serde_yaml_ng::from_str(&read("config/prometheus/prometheus.yml")).expect("valid YAML");
    let mut targets = 0;
    for job in config["scrape_configs"].as_sequence().expect("jobs") {
        for group in job["static_configs"].as_sequence().expect("static_configs") {
            for target in list(group.get("targets")) {
                compose.check_endpoint(target, target.split(':').next().unwrap_or_default());
                targets += 1;
            }
        }
    }
    assert!(targets > 0, "nothing is scraped");
}

#[test]
fn the_balancer_has_every_weir_and_asks_it_whether_it_is_ready() {
    let compose = Compose::load();
    let config = read(HAPROXY);
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut balanced = BTreeSet::new();
    for line in config.lines().map(words) {
        match line.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["server", name, endpoint] => {
                compose.check_endpoint(endpoint, name);
                balanced.insert((*name).to_owned());
            }
            ["option", "httpchk", "GET", path] => {
                assert!(sources("proxy/server/src").contains(&format!("\"{path}\"")), "no route {path}");
            }
            ["default-server", "check", "port", asked, ..] => {
                let asked = asked.parse().expect("a port");
                assert!(compose.weirs().all(|name| compose.listens(name).contains(&asked)), "{asked}");
            }
            _ => {}
        }
    }
    assert_eq!(balanced, compose.weirs().map(str::to_owned).collect(), "weirs and the balancer's servers differ");
}

#[test]
fn the_storefront_is_started_with_flags_it_has() {
    let compose = Compose::load();
    let code = sources("storefront/src");
    for name in ["storefront", "catalogue"] {
        for word in list(compose.services[name].get("command")) {
            let flag = word.trim_start_matches("--").replace('-', "_");
            if word.contains([':', '.', '/']) {
                continue;
            }
            let variant: String = flag[..1].to_uppercase() + &flag[1..];
            assert!(has_word(&code, &flag) || has_word(&code, &variant), "{name}: the storefront knows no {word}");
        }
    }
}

// ---- reading ------------------------------------------------------------------------------------------------------

struct Compose {
    document: Value,
    services: BTreeMap<String, Value>,
}

impl Compose {
    fn load() -> Self {
        let mut document: Value = serde_yaml_ng::from_str(&read("docker-compose.yml")).expect("valid YAML");
        document.apply_merge().expect("valid merge keys");
        let services =
            keys(&document["services"]).map(|name| (name.to_owned(), document["services"][name].clone())).collect();
        Compose { document, services }
    }

    /// The services that are weirs.
    fn weirs(&self) -> impl Iterator<Item = &str> {
        self.services.iter().filter(|(_, service)| image_of(service) == "weir:local").map(|(name, _)| name.as_str())
    }

    /// Ports that the program in a service's container listens on, from its own configuration.
    fn listens(&self, service: &str) -> Vec<u16> {
        let image = text(&self.services[service]["image"]);
        match image {
            "weir:local" => {
                let config = toml(Path::new("config/docker/weir.toml"));
                let own = [&config["listen"], &config["http_listen"], &config["peers"]["listen"]];
                own.iter().filter_map(|address| port(address.as_str()?)).collect()
            }
            "storefront:local" => {
                let listed = self.services[service].get("environment").map(|given| {
                    keys(given).filter(|key| key.ends_with("_LISTEN")).map(|key| text(&given[key])).collect::<Vec<_>>()
                });
                list(self.services[service].get("command")).chain(listed.unwrap_or_default()).filter_map(port).collect()
            }
            _ if image.starts_with("haproxy:") => {
                read(HAPROXY).lines().filter_map(|line| port(line.trim().strip_prefix("bind ")?)).collect()
            }
            _ if image.starts_with("postgres:") => vec![5432],
            _ if image.starts_with("redis:") => vec![6379],
            _ if image.starts_with("prom/prometheus:") => vec![9090],
            _ => vec![],
        }
    }

    fn check_endpoint(&self, endpoint: &str, service: &str) {
        assert_eq!(endpoint.split(':').next(), Some(service), "{endpoint} is not service {service}");
        assert!(self.services.contains_key(service), "{endpoint}: there is no service {service}");
        let port = port(endpoint).unwrap_or_else(|| panic!("{endpoint} has no port"));
        assert!(self.listens(service).contains(&port), "{service} does not listen on {port}");
    }
}

fn image_of(service: &Value) -> &str {
    text(&service["image"])
}

fn port(endpoint: &str) -> Option<u16> {
    endpoint.rsplit_once(':')?.1.parse().ok()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests live one below the root").to_path_buf()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn toml(path: &Path) -> toml::Value {
    toml::from_str(&read(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All Rust sources below a folder, in one string.
fn sources(folder: &str) -> String {
    let walk = walkdir::WalkDir::new(root().join(folder)).into_iter().map(|entry| entry.expect("readable"));
    walk.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "rs"))
        .map(|entry| read(entry.path()))
        .collect()
}

/// Dotted paths of every key in a TOML value; elements of arrays share their array's path.
fn paths(value: &toml::Value) -> BTreeSet<String> {
    fn walk(value: &toml::Value, at: &str, out: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, inner) in table {
                    let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                    walk(inner, &path, out);
                    out.insert(path);
                }
            }
            toml::Value::Array(items) => items.iter().for_each(|item| walk(item, at, out)),
            _ => {}
        }
    }
    let mut out = BTreeSet::new();
    walk(value, "", &mut out);
    out
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value:?} is not a string"))
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &str> {
    value.and_then(Value::as_sequence).into_iter().flatten().map(text)
}

fn keys(value: &Value) -> impl Iterator<Item = &str> {
    value.as_mapping().into_iter().flat_map(|mapping| mapping.keys()).map(text)
}

fn has_word(haystack: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    haystack
        .match_indices(word)
        .any(|(at, _)| !haystack[..at].ends_with(is_word) && !haystack[at + word.len()..].starts_with(is_word))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}
