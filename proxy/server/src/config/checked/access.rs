//! The parts of the file that say who gets in: TLS on both sides, HBA rules, weir's own login, `auth_query`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use toml::Spanned;
use weir_core::hba::Hba;

use super::{Checked, WORLD, absolute, at, choice, non_empty, private_file, secret_env, secret_file, unknown};
use crate::back::tls::{Material, ServerTls, ServerTlsMode};
use crate::config::error::Source;
use crate::config::passfile::PassFile;
use crate::config::raw;
use crate::config::value::Time;
use crate::config::{
    AuthQueryConfig, ConfigError, DatabaseConfig, HubConfig, Secret, ServerAuth, ServerPassword, TlsConfig, TlsMode,
};

/// Looks a role up by its name. Every name is found in pg_catalog: the search_path of that connection is weir's.
const AUTH_QUERY: &str =
    "SELECT rolname, rolpassword, rolvaliduntil FROM pg_catalog.pg_authid WHERE rolname = $1 AND rolcanlogin";

pub(super) fn tls(source: &Source, raw: &raw::Tls) -> Checked<TlsConfig> {
    let mode = match &raw.mode {
        None => TlsMode::Allow,
        Some(mode) => choice(
            source,
            mode,
            "TLS mode",
            &[("disable", TlsMode::Disable), ("allow", TlsMode::Allow), ("require", TlsMode::Require)],
        )?,
    };
    let certificate = absolute(source, raw.certificate.get_ref());
    let key = absolute(source, raw.key.get_ref());
    if mode != TlsMode::Disable {
        at(source, &raw.key, private_file(&key, WORLD))?;
    }
    let client_ca = raw.client_ca.as_ref().map(|path| absolute(source, path.get_ref()));
    Ok(TlsConfig { certificate, key, client_ca, mode })
}

/// Without a section as `sslmode` of the upstream says, and else no TLS.
pub(super) fn server_tls(
    source: &Source,
    raw: Option<&Spanned<raw::ServerTls>>,
    upstream: Option<ServerTlsMode>,
) -> Checked<ServerTls> {
    let Some(spanned) = raw else {
        let mode = upstream.unwrap_or_default();
        return ServerTls::new(mode, Material::default()).map_err(|problem| source.whole(problem));
    };
    let raw = spanned.get_ref();
    let modes = [
        ("disable", ServerTlsMode::Disable),
        ("prefer", ServerTlsMode::Prefer),
        ("require", ServerTlsMode::Require),
        ("verify-ca", ServerTlsMode::VerifyCa),
        ("verify-full", ServerTlsMode::VerifyFull),
    ];
    let mode =
        raw.mode.as_ref().map_or(Ok(ServerTlsMode::VerifyFull), |mode| choice(source, mode, "TLS mode", &modes))?;
    let authorities = raw.ca.as_ref().map_or(Ok(Vec::new()), |path| certificates(source, path))?;
    let identity = match (&raw.certificate, &raw.key) {
        (None, None) => None,
        (Some(chain), Some(key)) => Some((certificates(source, chain)?, private_key(source, key)?)),
        _ => return Err(source.error(spanned.span(), "[server_tls] needs both certificate and key, or neither")),
    };
    ServerTls::new(mode, Material { authorities, identity })
        .map_err(|problem| source.error(spanned.span(), format!("[server_tls]: {problem}")))
}

pub(super) fn certificates(source: &Source, raw: &Spanned<String>) -> Checked<Vec<CertificateDer<'static>>> {
    let path = absolute(source, raw.get_ref());
    let certificates = CertificateDer::pem_reader_iter(open(source, raw, &path)?).collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(source.error(raw.span(), format!("{} holds no PEM certificate", path.display()))),
    }
}

pub(super) fn private_key(source: &Source, raw: &Spanned<String>) -> Checked<PrivateKeyDer<'static>> {
    let path = absolute(source, raw.get_ref());
    at(source, raw, private_file(&path, WORLD))?;
    PrivateKeyDer::from_pem_reader(open(source, raw, &path)?)
        .map_err(|_| source.error(raw.span(), format!("{} holds no PEM key", path.display())))
}

fn open(source: &Source, raw: &Spanned<String>, path: &Path) -> Checked<BufReader<File>> {
    let file = File::open(path).map(BufReader::new).map_err(|error| ConfigError::unreadable(path, &error));
    at(source, raw, file)
}

/// The rules; the default ones without a file.
pub(super) fn hba(source: &Source, raw: Option<&Spanned<String>>, tls: Option<&TlsConfig>) -> Checked<Hba> {
    let Some(raw) = raw else { return Ok(Hba::default()) };
    let path = absolute(source, raw.get_ref());
    let text = std::fs::read_to_string(&path).map_err(|error| ConfigError::unreadable(&path, &error));
    let text = at(source, raw, text)?;
    let wrong =
        |line: usize, message: String| ConfigError { path: path.clone(), line: Some(line), message, hint: None };
    let hba = Hba::parse(&text).map_err(|error| {
        let told = wrong(error.line, error.message);
        match error.hint {
            Some(hint) => told.hint(hint),
            None => told,
        }
    })?;
    match hba.asks_for_certificates() {
        Some(line) if tls.is_none_or(|tls| tls.client_ca.is_none()) => {
            Err(wrong(line, "it asks for client certificates, but nothing says which authority signs them".to_owned())
                .hint("set client_ca in [tls]"))
        }
        _ => Ok(hba),
    }
}

pub(super) fn server_auth(source: &Source, raw: &Spanned<raw::ServerAuth>, tls: &ServerTls) -> Checked<ServerAuth> {
    let span = raw.span();
    let raw = raw.get_ref();
    let password = match (&raw.password_file, &raw.password_env, &raw.passfile) {
        (Some(file), None, None) => ServerPassword::Fixed(secret_file(source, file)?),
        (None, Some(name), None) => ServerPassword::Fixed(secret_env(source, name)?),
        (None, None, Some(file)) => {
            let path = absolute(source, file.get_ref());
            ServerPassword::Passfile(at(source, file, PassFile::load(&path))?)
        }
        (None, None, None) => ServerPassword::Passfile(default_passfile()?),
        _ => {
            return Err(source.error(span, "[server_auth] takes one of password_file, password_env, passfile"));
        }
    };
    Ok(ServerAuth { user: non_empty(source, &raw.user, "user")?, password, tls: tls.clone() })
}

pub(in crate::config) fn default_passfile() -> Checked<PassFile> {
    PassFile::default_path().map_or(Ok(PassFile::default()), |path| PassFile::load(&path))
}

/// `auth` lends its passfile to a DSN without password.
pub(super) fn hub(source: &Source, hub: &Spanned<raw::Hub>, auth: &ServerAuth) -> Checked<HubConfig> {
    let span = hub.span();
    let hub = hub.get_ref();
    let (place, dsn) = match (&hub.dsn, &hub.dsn_file, &hub.dsn_env) {
        (Some(dsn), None, None) => (dsn.span(), Secret::new(dsn.get_ref().as_str())),
        (None, Some(file), None) => (file.span(), secret_file(source, file)?),
        (None, None, Some(name)) => (name.span(), secret_env(source, name)?),
        _ => return Err(source.error(span, "[hub] needs exactly one of dsn, dsn_file, dsn_env")),
    };
    let replicas = hub.replicas.iter().map(|replica| super::endpoint(source, replica)).collect::<Checked<Vec<_>>>()?;
    if let Some(twice) = (1..replicas.len()).find(|at| replicas[..*at].contains(&replicas[*at])) {
        let message = format!("server `{}` is used twice", replicas[twice]);
        return Err(source.error(hub.replicas[twice].span(), message));
    }
    Ok(HubConfig { replicas, ..hub_dsn(dsn, auth, |message| source.error(place.clone(), message))? })
}

pub(super) fn hub_dsn(dsn: Secret, auth: &ServerAuth, wrong: impl Fn(&str) -> ConfigError) -> Checked<HubConfig> {
    // The parser's error may quote the string, password and all, so it is not repeated.
    let parsed: tokio_postgres::Config = dsn.expose().parse().map_err(|_| {
        wrong("the hub's dsn is not a Postgres connection string").hint("postgres://user:password@host:port/database")
    })?;
    let password = if parsed.get_password().is_some() { None } else { hub_password(&parsed, auth)? };
    // `sslmode=require` in the DSN holds where the file says nothing of TLS.
    let tls = match (auth.tls.mode(), parsed.get_ssl_mode()) {
        (ServerTlsMode::Disable, tokio_postgres::config::SslMode::Require) => {
            ServerTls::new(ServerTlsMode::Require, Material::default()).map_err(|problem| wrong(&problem))?
        }
        _ => auth.tls.clone(),
    };
    Ok(HubConfig { dsn, password, tls, replicas: Vec::new(), made_from: None })
}

fn hub_password(dsn: &tokio_postgres::Config, auth: &ServerAuth) -> Checked<Option<Secret>> {
    let default;
    let file = match &auth.password {
        ServerPassword::Passfile(file) => file,
        ServerPassword::Fixed(_) => {
            default = default_passfile()?;
            &default
        }
    };
    let Some(tokio_postgres::config::Host::Tcp(host)) = dsn.get_hosts().first() else { return Ok(None) };
    let port = dsn.get_ports().first().copied().unwrap_or(5432);
    let user = dsn.get_user().unwrap_or_default();
    Ok(file.find(host, port, dsn.get_dbname().unwrap_or(user), user).cloned())
}

pub(super) fn auth_query(
    source: &Source,
    raw: Option<&raw::AuthQuery>,
    databases: &[DatabaseConfig],
    upstream: bool,
) -> Checked<Option<AuthQueryConfig>> {
    let default = raw::AuthQuery { query: None, database: None, max_age: None };
    let raw = match raw {
        Some(raw) => raw,
        // Serving every database of a server includes its users.
        None if upstream => &default,
        None => return Ok(None),
    };
    let names = || databases.iter().map(|database| database.name.as_str());
    let database = match &raw.database {
        Some(name) if names().any(|known| known == name.get_ref()) => Some(name.get_ref().clone()),
        Some(name) => return Err(unknown(source, name, "database", names())),
        None => None,
    };
    let sql = match &raw.query {
        None => AUTH_QUERY.to_owned(),
        Some(query) if query.get_ref().contains("$1") => non_empty(source, query, "query")?,
        Some(query) => {
            let error = source.error(query.span(), "the query does not use $1, the user's name");
            return Err(error.hint("SELECT name, password, valid_until FROM secrets.lookup($1)"));
        }
    };
    let max_age = raw.max_age.as_ref().map_or(Duration::ZERO, |raw| {
        let Time(age) = *raw.get_ref();
        age
    });
    if let (true, Some(raw)) = (max_age > Duration::from_secs(3600), &raw.max_age) {
        return Err(
            source.error(raw.span(), "max_age is more than 1h: a changed password would take that long to count")
        );
    }
    Ok(Some(AuthQueryConfig { sql, database, max_age }))
}
