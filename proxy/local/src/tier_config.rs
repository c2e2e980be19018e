//! weir's configuration files for a local tier: where its servers are, and where the storefront's tables live.
//!
//! The files are what an operator would write by hand; `config/weir.toml` explains every key.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use toml::{Table, Value};

use crate::cluster::SUPERUSER;
use crate::tier::write_private;
use crate::{Shard, Tier};

/// Tables sharded by `user_id bigint`, and so colocated.
const BY_USER: &[&str] = &[
    "users",
    "sessions",
    "cart_items",
    "orders",
    "order_items",
    "order_events",
    "payments",
    "webhook_events",
    "idempotency",
    "outbox",
];
/// Tables sharded by `product_id bigint`.
const BY_PRODUCT: &[&str] = &["inventory", "stock_holds"];
/// Tables sharded by `email text`.
const BY_EMAIL: &[&str] = &["user_emails"];
/// Tables every shard has whole.
const REFERENCE: &[&str] = &["products", "categories"];

/// What the files say beyond the servers' addresses.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpec {
    /// weir's port for Postgres clients.
    pub port: u16,
    /// weir's port for HTTP.
    pub http_port: u16,
    /// TOML merged over what is generated: tables are merged key by key, anything else is replaced.
    pub extra: String,
}

impl Tier {
    /// Writes `weir.toml`, `users.toml` and `admin.pw` into the run's directory; gives the first one's path.
    pub fn write_config(&self, spec: &ConfigSpec) -> Result<PathBuf> {
        self.write_config_as("weir.toml", spec)
    }

    /// The same under another name, for one more weir.
    pub fn write_config_as(&self, name: &str, spec: &ConfigSpec) -> Result<PathBuf> {
        let dir = self.run.path();
        let mut text = self.config_text(spec);
        if !spec.extra.trim().is_empty() {
            let mut config: Table = text.parse().context("the generated configuration")?;
            merge(&mut config, spec.extra.parse().context("the extra configuration")?);
            text = toml::to_string(&config)?;
        }
        write_private(&dir.join("users.toml"), &format!("[user.shop]\npassword = \"{}\"\n", self.state.shop_password))?;
        write_private(&dir.join("admin.pw"), &format!("{}\n", self.state.admin_password))?;
        let path = dir.join(name);
        write_private(&path, &text)?;
        Ok(path)
    }

    fn config_text(&self, spec: &ConfigSpec) -> String {
        let mut text = format!(
            "listen = \"127.0.0.1:{}\"\nhttp_listen = \"127.0.0.1:{}\"\nusers_file = \"users.toml\"\n\
             admin_users = [\"shop\"]\n\n[hub]\ndsn = \"{}\"\nreplicas = {:?}\n\n[server_auth]\nuser = \"{SUPERUSER}\"\n\
             password_file = \"admin.pw\"\n\n[cache]\nenabled = true\n",
            spec.port,
            spec.http_port,
            self.hub.admin_dsn("weir_hub"),
            self.hub_replicas.iter().map(|replica| replica.address()).collect::<Vec<_>>(),
        );
        if let Some(redis) = &self.redis {
            text.extend(["redis = \"", &redis.url(), "\"\n"]);
        }
        text.push_str("\n[database.shop]\nserver_database = \"shop\"\n");
        for shard in &self.shards {
            text.push_str(&shard_text(shard));
        }
        for (tables, key, key_type) in
            [(BY_USER, "user_id", "bigint"), (BY_PRODUCT, "product_id", "bigint"), (BY_EMAIL, "email", "text")]
        {
            for table in tables {
                let placement = format!("kind = \"sharded\"\nkey = \"{key}\"\ntype = \"{key_type}\"\n");
                text.extend(["\n[[database.shop.table]]\nname = \"", table, "\"\n", &placement]);
            }
        }
        for table in REFERENCE {
            text.extend(["\n[[database.shop.table]]\nname = \"", table, "\"\nkind = \"reference\"\n"]);
        }
        text
    }
}

fn shard_text(shard: &Shard) -> String {
    let mut text =
        format!("\n[[database.shop.shard]]\nname = \"{}\"\nprimary = \"{}\"\n", shard.name, shard.primary.address());
    let replicas: Vec<String> = shard.replicas.iter().map(|replica| replica.address()).collect();
    // A list of plain addresses is written alike in TOML and by Rust's debug formatting.
    let _ = writeln!(text, "replicas = {replicas:?}");
    text
}

/// Puts `over` on top of `base`: tables key by key, anything else as a whole.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_keys_are_merged_into_tables() {
        let mut base: Table = "a = 1\nlist = [1]\n[cache]\nenabled = true\nredis = 'x'".parse().expect("toml");
        merge(&mut base, "list = [2]\n[cache]\nenabled = false\n[pool]\nsize = 3".parse().expect("toml"));
        let want: Table =
            "a = 1\nlist = [2]\n[cache]\nenabled = false\nredis = 'x'\n[pool]\nsize = 3".parse().expect("toml");
        assert_eq!(base, want);
    }
}
