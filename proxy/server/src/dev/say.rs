//! What `weir dev` prints when everything is ready: one line of JSON for programs, one page for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::stack::Stack;
use super::tour::Stop;

/// The line of `--json`. Its keys are a contract with the tools that drive it.
#[derive(Serialize)]
pub(super) struct Endpoints {
    weir: String,
    admin: String,
    hub: String,
    shards: Vec<ShardEndpoints>,
    redis: Option<String>,
    storefront: Option<String>,
    metrics: String,
    pids: BTreeMap<String, u32>,
}

#[derive(Serialize)]
struct ShardEndpoints {
    name: String,
    primary: String,
    replicas: Vec<String>,
}

/// Where everything is. Shards and the hub are given as their superuser sees them.
pub(super) fn endpoints(stack: &Stack) -> Endpoints {
    let shards = stack.tier.shards.iter().map(|shard| ShardEndpoints {
        name: shard.name.clone(),
        primary: shard.primary.admin_dsn("shop"),
        replicas: shard.replicas.iter().map(|replica| replica.admin_dsn("shop")).collect(),
    });
    Endpoints {
        weir: stack.weir_dsn("shop"),
        admin: stack.weir_dsn("weir"),
        hub: stack.tier.hub.admin_dsn("weir_hub"),
        shards: shards.collect(),
        redis: stack.tier.redis.as_ref().map(weir_local::Redis::url),
        storefront: stack.storefront.as_ref().map(|storefront| storefront.url().to_owned()),
        metrics: format!("http://127.0.0.1:{}/metrics", stack.http_port),
        pids: pids(stack),
    }
}

fn pids(stack: &Stack) -> BTreeMap<String, u32> {
    let tier = &stack.tier;
    let servers = tier.shards.iter().flat_map(weir_local::Shard::servers).chain([&*tier.hub]);
    let servers = servers.map(|server| (server.name().to_owned(), server.pid()));
    let others = [
        ("weir", stack.weir.pid()),
        ("storefront", stack.storefront.as_ref().map(weir_local::Storefront::pid)),
        ("redis", tier.redis.as_ref().and_then(weir_local::Redis::pid)),
    ];
    let others = others.into_iter().map(|(name, pid)| (name.to_owned(), pid));
    servers.chain(others).filter_map(|(name, pid)| Some((name, pid?))).collect()
}

/// The page for people.
pub(super) fn page(stack: &Stack, tour: &[Stop]) -> String {
    let endpoints = endpoints(stack);
    let mut lines: Vec<(&str, String)> = Vec::new();
    if let Some(storefront) = endpoints.storefront {
        lines.push(("shop", format!("{storefront}   ({})", stack.catalogue.as_deref().unwrap_or("no products"))));
    }
    lines.push(("psql", format!("psql '{}'", endpoints.weir)));
    lines.push(("admin", format!("psql '{}' -c 'SHOW SHARDS'", endpoints.admin)));
    lines.push(("metrics", endpoints.metrics));
    lines.push(("files", stack.directory().display().to_string()));
    let mut page = String::from("\n");
    page.push_str(&boxed(&lines));
    if !tour.is_empty() {
        page.push_str(
            "\nTry this in psql; weir says where each statement goes and why (ROUTE '…' in the admin database):\n",
        );
    }
    for stop in tour {
        let _ = writeln!(page, "\n  {}\n    {};", stop.title, stop.sql);
        let width = stop.route.iter().map(|(item, _)| item.chars().count()).max().unwrap_or(0);
        for (item, value) in stop.route.iter().filter(|(_, value)| !value.is_empty()) {
            let _ = writeln!(page, "      {item:width$}  {value}");
        }
    }
    let end = if stack.is_kept() { "stops everything and keeps the data" } else { "stops everything and removes it" };
    let _ = writeln!(page, "\nCtrl-C {end}.");
    page
}

/// Names and values in a frame.
fn boxed(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(_, value)| value.chars().count()).max().unwrap_or(0);
    let rule = "─".repeat(width + 13);
    let mut text = format!("┌{rule}┐\n");
    for (name, value) in lines {
        let _ = writeln!(text, "│ {name:9}  {value:width$} │");
    }
    let _ = writeln!(text, "└{rule}┘");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_straight() {
        let text = boxed(&[("shop", "http://x".to_owned()), ("psql", "é".to_owned())]);
        let widths: Vec<usize> = text.lines().map(|line| line.chars().count()).collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
    }

    #[test]
    fn the_json_line_has_the_contracted_keys() {
        let endpoints = Endpoints {
            weir: "postgres://w".into(),
            admin: "postgres://w/weir".into(),
            hub: "postgres://h".into(),
            shards: vec![ShardEndpoints { name: "s".into(), primary: "p".into(), replicas: vec!["r".into()] }],
            redis: None,
            storefront: Some("http://s".into()),
            metrics: "http://m/metrics".into(),
            pids: BTreeMap::from([("weir".to_owned(), 1)]),
        };
        assert_eq!(
            serde_json::to_string(&endpoints).expect("plain data"),
            r#"{"weir":"postgres://w","admin":"postgres://w/weir","hub":"postgres://h","shards":[{"name":"s","primary":"p","replicas":["r"]}],"redis":null,"storefront":"http://s","metrics":"http://m/metrics","pids":{"weir":1}}"#
        );
    }
}
