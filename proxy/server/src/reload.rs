//! Reading the configuration again: RELOAD in the admin console, and SIGHUP.
//!
//! Invariant: a file that is wrong changes nothing. What can change at run time changes as one value; what cannot keeps its
//! old value in the configuration in force, and is named.

use std::sync::Arc;

use weir_core::error::{Blame, UserError};

use crate::app::App;
use crate::config::{Config, DatabaseConfig, PeersConfig};
use crate::fleet::tls::Ends;
use crate::front::tls::ClientTls;

/// SQLSTATE of a configuration file that cannot be used (ERRCODE_CONFIG_FILE_ERROR).
const CONFIG_FILE_ERROR: &str = "F0000";

/// Reads the configuration again. Gives the keys that have changed but need a restart.
pub fn reload(app: &App) -> Result<Vec<String>, UserError> {
    let fresh = app.source.read().map_err(|error| unusable(app, error.to_string()))?;
    let tls = ClientTls::of(&fresh).map_err(|error| unusable(app, format!("tls: {error:#}")))?;
    let peers = fresh.peers.as_ref().and_then(|peers| peers.tls.as_ref()).map(Ends::read).transpose();
    let peers = peers.map_err(|error| unusable(app, format!("peers: {error}")))?;
    let old = app.config();
    let fixed = fixed(&old, &fresh);
    if let Some(level) = &app.source.log_level {
        level.set(fresh.log.level);
    }
    app.install(merged(&old, fresh));
    app.tls.store(tls);
    if let (Some(fleet), Some(ends)) = (&app.fleet, peers) {
        fleet.renew_tls(ends);
    }
    app.metrics.set_reload_success(true);
    if fixed.is_empty() {
        tracing::info!("configuration reloaded");
    } else {
        tracing::warn!("configuration reloaded; these need a restart: {}", fixed.join(", "));
    }
    Ok(fixed)
}

/// Nothing has changed, and this is why.
fn unusable(app: &App, why: String) -> UserError {
    app.metrics.set_reload_success(false);
    tracing::error!("the configuration stays as it is: {why}");
    UserError::new(Blame::Client, CONFIG_FILE_ERROR, "the configuration cannot be used; the old one stays in force")
        .detail(why)
        .hint("Correct the file; `weir check` tells the same.")
}

/// Serves SIGHUP for ever.
pub async fn on_signal(app: Arc<App>) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        // Told in the log either way.
        let _ = reload(&app);
    }
}

/// What differs and cannot be changed at run time, as keys of the file.
fn fixed(old: &Config, new: &Config) -> Vec<String> {
    let mut keys = Vec::new();
    let mut differs = |key: &str, differs: bool| {
        if differs {
            keys.push(key.to_owned());
        }
    };
    differs("listen", old.listen != new.listen);
    differs("workers", old.workers != new.workers);
    differs("http_listen", old.http_listen != new.http_listen);
    differs("hub", old.hub != new.hub);
    differs("engine", old.engine != new.engine);
    differs("cache", old.cache != new.cache);
    differs("peers", peers(old, new) != new.peers);
    differs("zone", old.zones != new.zones);
    differs("server_auth", old.server_auth != new.server_auth);
    differs("auth_query", old.auth_query != new.auth_query);
    differs("log.format", old.log.format != new.log.format);
    differs("limits.connect_time_max", old.limits.connect_time_max != new.limits.connect_time_max);
    let name = |database: &DatabaseConfig| database.name.clone();
    let all = |config: &Config| config.databases.iter().chain(&config.wildcard).cloned().collect::<Vec<_>>();
    let (before, after) = (all(old), all(new));
    for database in &after {
        let same = before.iter().find(|other| other.name == database.name).is_some_and(|other| same(other, database));
        differs(&format!("database.{}", name(database)), !same);
    }
    for gone in before.iter().filter(|database| after.iter().all(|other| other.name != database.name)) {
        differs(&format!("database.{}", name(gone)), true);
    }
    keys
}

/// Of the peers only certificates can change, where there are some.
fn peers(old: &Config, new: &Config) -> Option<PeersConfig> {
    let old = old.peers.clone()?;
    let fresh = new.peers.as_ref().and_then(|new| new.tls.clone()).filter(|_| old.tls.is_some());
    Some(PeersConfig { tls: fresh.or(old.tls.clone()), ..old })
}

/// Apart from its limits.
fn same(old: &DatabaseConfig, new: &DatabaseConfig) -> bool {
    let without_limits = |database: &DatabaseConfig| DatabaseConfig {
        overrides: crate::config::Overrides::default(),
        ..database.clone()
    };
    without_limits(old) == without_limits(new)
}

/// The new configuration with the old values where they cannot change.
fn merged(old: &Config, new: Config) -> Config {
    let limits_of = |old: &DatabaseConfig| {
        let fresh = new.databases.iter().chain(&new.wildcard).find(|other| other.name == old.name);
        let overrides = fresh.map_or_else(|| old.overrides.clone(), |fresh| fresh.overrides.clone());
        DatabaseConfig { overrides, ..old.clone() }
    };
    let databases = old.databases.iter().map(limits_of).collect();
    let wildcard = old.wildcard.as_ref().map(limits_of);
    let peers = peers(old, &new);
    let mut limits = new.limits.clone();
    limits.connect_time_max = old.limits.connect_time_max;
    let mut log = new.log.clone();
    log.format = old.log.format;
    Config {
        path: new.path,
        listen: old.listen,
        http_listen: old.http_listen,
        users_file: new.users_file,
        workers: old.workers,
        users: new.users,
        hba: new.hba,
        auth_query: old.auth_query.clone(),
        hub: old.hub.clone(),
        engine: old.engine.clone(),
        databases,
        wildcard,
        overrides: new.overrides,
        pool: new.pool,
        limits,
        reshard: new.reshard,
        cache: old.cache.clone(),
        peers,
        zones: old.zones.clone(),
        tls: new.tls,
        server_auth: old.server_auth.clone(),
        log,
        admin_users: new.admin_users,
        stats_users: new.stats_users,
    }
}
