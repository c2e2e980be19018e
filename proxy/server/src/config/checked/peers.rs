//! The part of the file that names this proxy to others in front of the same servers.

use std::time::Duration;

use toml::Spanned;

use super::{Checked, HTTP_LISTEN, address, endpoint, redis, secret_env, secret_file, time, unknown, variable};
use crate::config::error::Source;
use crate::config::raw;
use crate::config::{PeersConfig, PeersMode, PeersTlsConfig};
use crate::fleet::tls::PeerTls;

/// Who knows it can void every cache; it must not be guessed.
const SECRET_BYTES_MIN: usize = 16;
/// A shorter lease is lost to a busy server, a longer one keeps writes waiting when a proxy dies.
const LEASE_MIN: Duration = Duration::from_millis(300);
const LEASE_MAX: Duration = Duration::from_secs(60);

/// The section as a whole.
pub(super) fn peers(source: &Source, peers: Option<&Spanned<raw::Peers>>) -> Checked<Option<PeersConfig>> {
    let Some(peers) = peers else { return Ok(None) };
    let span = peers.span();
    let peers = peers.get_ref();
    let secret = match (&peers.secret_file, &peers.secret_env) {
        (Some(file), None) => secret_file(source, file)?,
        (None, Some(name)) => secret_env(source, name)?,
        _ => return Err(source.error(span, "[peers] needs one of secret_file, secret_env")),
    };
    if secret.expose().len() < SECRET_BYTES_MIN {
        let message = format!("the peers' secret has less than {SECRET_BYTES_MIN} bytes");
        return Err(source.error(span, message).hint("openssl rand -hex 32"));
    }
    let listen = address(source, None, Some(&peers.listen), HTTP_LISTEN)?;
    let advertise = match (&peers.advertise, &peers.advertise_env) {
        (Some(_), Some(other)) => return Err(source.error(other.span(), "say advertise or advertise_env, not both")),
        (Some(at), None) => Some(endpoint(source, at)?.to_string()),
        (None, Some(name)) => {
            let at = variable(source, name)?;
            Some(endpoint(source, &Spanned::new(name.span(), at))?.to_string())
        }
        (None, None) => None,
    };
    if advertise.is_none() && listen.ip().is_unspecified() {
        let message = "listen names no address that others could connect to";
        return Err(source.error(peers.listen.span(), message).hint("say advertise = \"host:port\""));
    }
    let lease = time(source, peers.lease.as_ref(), "lease", Duration::from_secs(1))?;
    if !(LEASE_MIN..=LEASE_MAX).contains(&lease) {
        let place = peers.lease.as_ref().map_or(span, Spanned::span);
        return Err(source.error(place, format!("lease must be from {LEASE_MIN:?} to {LEASE_MAX:?}")));
    }
    let tls = tls(source, peers)?;
    Ok(Some(PeersConfig { listen, advertise, secret, mode: mode(source, peers)?, lease, tls }))
}

fn tls(source: &Source, peers: &raw::Peers) -> Checked<Option<PeersTlsConfig>> {
    let (authority, chain, key) = match (&peers.ca, &peers.certificate, &peers.key) {
        (None, None, None) => return Ok(None),
        (Some(authority), Some(chain), Some(key)) => (authority, chain, key),
        (Some(one), ..) | (_, Some(one), _) | (.., Some(one)) => {
            return Err(source.error(one.span(), "TLS between peers needs all of ca, certificate and key"));
        }
    };
    let authorities = redis::authorities(source, authority)?;
    let (certificate, key) = redis::shown(source, chain, key)?;
    let config = PeersTlsConfig { authorities, certificate, key };
    PeerTls::new(Some(&config)).map_err(|error| source.error(chain.span(), error))?;
    Ok(Some(config))
}

fn mode(source: &Source, peers: &raw::Peers) -> Checked<PeersMode> {
    match peers.mode.as_ref().map(|word| (word, word.get_ref().as_str())) {
        None | Some((_, "leased")) => Ok(PeersMode::Leased),
        Some((_, "push")) => Ok(PeersMode::Push),
        Some((word, "checked")) => {
            let message = "mode = \"checked\" is not supported: nothing yet proves at every read that Redis has not \
                           gone back to an older state";
            let hint = "leased promises as much where proxies reach each other; one proxy needs no [peers]";
            Err(source.error(word.span(), message).hint(hint))
        }
        Some((word, _)) => Err(unknown(source, word, "mode of peers", ["leased", "push"].into_iter())),
    }
}
