//! `[cache] redis` and the keys beside it: where Redis is, as whom weir logs in, and over what.
//!
//! The URL may hold a password: what is wrong is said without repeating it.

use toml::Spanned;

use super::access::{certificates, private_key};
use super::{Checked, absolute, at, non_empty, secret_env, secret_file};
use crate::cache::{BadRedis, RedisServers};
use crate::config::error::Source;
use crate::config::raw;
use crate::config::upstream::Given;
use crate::config::{ConfigError, RedisConfig, Secret};

const FORM: &str = "redis://[[user]:password@]host:port[/db], redis+sentinel://host:port,…/master[/db] or \
                    redis+cluster://host:port,…; rediss… for TLS";

/// The flag wins over the keys that hold a URL; the others add to either.
pub(super) fn redis(source: &Source, raw: &raw::Cache, flag: Option<&Secret>) -> Checked<Option<RedisConfig>> {
    let held;
    let given = match (flag, &raw.redis, &raw.redis_file, &raw.redis_env) {
        (Some(_), ..) => Given::one(flag, "--redis", None),
        (None, url, None, None) => Given::one(None, "--redis", url.as_ref()),
        (None, None, Some(key), None) => {
            held = secret_file(source, key)?;
            Some(Given::at(held.expose(), key))
        }
        (None, None, None, Some(key)) => {
            held = secret_env(source, key)?;
            Some(Given::at(held.expose(), key))
        }
        (None, _, Some(key), _) | (None, Some(_), None, Some(key)) => {
            return Err(source.error(key.span(), "[cache] takes one of redis, redis_file, redis_env"));
        }
    };
    let Some(given) = given else {
        return match beside(raw).next() {
            Some((name, key)) => Err(source.error(key.span(), format!("{name} is given, but not where Redis is"))),
            None => Ok(None),
        };
    };
    let password = |file: &Option<_>, name: &Option<_>| password(source, file.as_ref(), name.as_ref());
    let config = RedisConfig {
        url: Secret::new(given.text),
        user: raw.redis_user.as_ref().map(|user| non_empty(source, user, "redis_user")).transpose()?,
        password: password(&raw.redis_password_file, &raw.redis_password_env)?,
        sentinel_password: password(&raw.redis_sentinel_password_file, &raw.redis_sentinel_password_env)?,
        authorities: raw.redis_ca.as_ref().map(|path| authorities(source, path)).transpose()?,
        identity: identity(source, raw)?,
    };
    if let (false, Some((name, key))) = (given.text.starts_with("rediss"), of_tls(raw).next()) {
        let error = source.error(key.span(), format!("{name} is of no use without TLS"));
        return Err(error.hint("say rediss: instead of redis:"));
    }
    let servers = RedisServers::new(&config);
    let servers = servers.map_err(|bad| match (bad, of_tls(raw).next()) {
        (BadRedis::Certificates, Some((_, key))) => source.error(key.span(), bad.to_string()),
        _ => given.error(source, &bad.to_string()).hint(FORM),
    })?;
    match (servers, of_sentinels(raw).next()) {
        (RedisServers::One(_) | RedisServers::Cluster(_), Some((name, key))) => {
            Err(source.error(key.span(), format!("{name} is given, but no Sentinels are")).hint(FORM))
        }
        _ => Ok(Some(config)),
    }
}

type Key<'a> = (&'static str, &'a Spanned<String>);

/// The keys that say nothing without a URL.
fn beside(raw: &raw::Cache) -> impl Iterator<Item = Key<'_>> {
    let log_in = given([
        ("redis_user", &raw.redis_user),
        ("redis_password_file", &raw.redis_password_file),
        ("redis_password_env", &raw.redis_password_env),
    ]);
    log_in.chain(of_sentinels(raw)).chain(of_tls(raw))
}

fn of_sentinels(raw: &raw::Cache) -> impl Iterator<Item = Key<'_>> {
    given([
        ("redis_sentinel_password_file", &raw.redis_sentinel_password_file),
        ("redis_sentinel_password_env", &raw.redis_sentinel_password_env),
    ])
}

fn of_tls(raw: &raw::Cache) -> impl Iterator<Item = Key<'_>> {
    given([("redis_ca", &raw.redis_ca), ("redis_certificate", &raw.redis_certificate), ("redis_key", &raw.redis_key)])
}

fn given<'a, const COUNT: usize>(
    keys: [(&'static str, &'a Option<Spanned<String>>); COUNT],
) -> impl Iterator<Item = Key<'a>> {
    keys.into_iter().filter_map(|(name, key)| key.as_ref().map(|key| (name, key)))
}

fn password(
    source: &Source,
    file: Option<&Spanned<String>>,
    name: Option<&Spanned<String>>,
) -> Checked<Option<Secret>> {
    match (file, name) {
        (None, None) => Ok(None),
        (Some(file), None) => secret_file(source, file).map(Some),
        (None, Some(name)) => secret_env(source, name).map(Some),
        (Some(_), Some(name)) => Err(source.error(name.span(), "say where the password is in one place, not in two")),
    }
}

pub(super) fn authorities(source: &Source, path: &Spanned<String>) -> Checked<String> {
    certificates(source, path)?;
    text(source, path)
}

/// Certificate chain and key, as PEM.
pub(super) fn shown(source: &Source, chain: &Spanned<String>, key: &Spanned<String>) -> Checked<(String, Secret)> {
    certificates(source, chain)?;
    private_key(source, key)?;
    Ok((text(source, chain)?, Secret::new(text(source, key)?)))
}

fn identity(source: &Source, raw: &raw::Cache) -> Checked<Option<(String, Secret)>> {
    match (&raw.redis_certificate, &raw.redis_key) {
        (None, None) => Ok(None),
        (Some(chain), Some(key)) => shown(source, chain, key).map(Some),
        (Some(one), None) | (None, Some(one)) => {
            Err(source.error(one.span(), "[cache] needs both redis_certificate and redis_key, or neither"))
        }
    }
}

fn text(source: &Source, raw: &Spanned<String>) -> Checked<String> {
    let path = absolute(source, raw.get_ref());
    at(source, raw, std::fs::read_to_string(&path).map_err(|error| ConfigError::unreadable(&path, &error)))
}
