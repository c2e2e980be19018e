//! Who is asking: the session cookie, passwords, and the check that a POST comes from our own pages.
//!
//! Invariant: the cookie carries `user_id.secret`; the database stores only the secret's SHA-256, so neither a dump nor a
//! log can be used to log in. A session's secret changes whenever a visitor gains rights (register, log in).

use std::time::Duration;

use argon2::password_hash::{PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::sync::Semaphore;

use super::Shared;
use super::problem::Problem;
use crate::id::UserId;
use crate::keys::{random_bytes, sha256};
use crate::store::{Db, users};

const COOKIE: &str = "sid";
const COOKIE_SECONDS: u32 = 7 * 24 * 3600;
const HASHING_MAX: usize = 4;
const HASHING_WAIT_MAX: Duration = Duration::from_secs(5);

/// A visitor with a session: a customer, or a guest if there is no address.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// Their id.
    pub user: UserId,
    /// Their address; none: a guest.
    pub email: Option<String>,
    /// What they want to be called.
    pub name: Option<String>,
    token_hash: [u8; 32],
}

impl Visitor {
    /// Whether they have registered.
    pub fn is_customer(&self) -> bool {
        self.email.is_some()
    }
}

/// The visitor, if there is a valid session.
pub struct MaybeVisitor(pub Option<Visitor>);

/// A visitor who has registered; others are sent to log in.
pub struct Customer(pub Visitor);

impl FromRequestParts<Shared> for MaybeVisitor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shop: &Shared) -> Result<Self, Problem> {
        let Some((user, token_hash)) = cookie(&parts.headers) else {
            return Ok(Self(None));
        };
        let known = users::visitor(&shop.db, user, &token_hash).await?;
        Ok(Self(known.map(|known| Visitor { user, email: known.email, name: known.name, token_hash })))
    }
}

impl FromRequestParts<Shared> for Customer {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shop: &Shared) -> Result<Self, Problem> {
        let MaybeVisitor(visitor) = MaybeVisitor::from_request_parts(parts, shop).await?;
        match visitor.filter(Visitor::is_customer) {
            Some(visitor) => Ok(Self(visitor)),
            // After a POST the form's page is the place to come back to, and its path is the same.
            None => Err(Problem::log_in(parts.uri.path())),
        }
    }
}

fn cookie(headers: &HeaderMap) -> Option<(UserId, [u8; 32])> {
    let pairs = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = pairs.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let (_, value) = pairs.find(|(name, _)| *name == COOKIE)?;
    let (user, secret) = value.split_once('.')?;
    let secret = URL_SAFE_NO_PAD.decode(secret).ok().filter(|secret| secret.len() == 32)?;
    Some((UserId(user.parse().ok().filter(|id| *id > 0)?), sha256(&[&secret])))
}

fn cookie_header(value: &str, seconds: u32, secure: bool) -> HeaderValue {
    let secure = if secure { "; Secure" } else { "" };
    let text = format!("{COOKIE}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}");
    HeaderValue::from_str(&text).expect("digits, base64url and constants are a valid header")
}

/// Starts a session and returns its Set-Cookie header.
pub async fn start(shop: &Shared, user: UserId) -> Result<HeaderValue, Problem> {
    let secret = random_bytes();
    users::start_session(&shop.db, user, &sha256(&[&secret])).await?;
    Ok(cookie_header(&format!("{user}.{}", URL_SAFE_NO_PAD.encode(secret)), COOKIE_SECONDS, shop.secure_cookies))
}

/// Ends a session in the database.
pub async fn end(db: &Db, visitor: &Visitor) -> Result<(), Problem> {
    Ok(users::end_session(db, visitor.user, &visitor.token_hash).await?)
}

/// The Set-Cookie header that makes a browser forget.
pub fn forget(shop: &Shared) -> HeaderValue {
    cookie_header("", 0, shop.secure_cookies)
}

/// Hashes and checks passwords away from the async threads, a few at a time.
pub struct Passwords {
    argon2: Argon2<'static>,
    turns: Semaphore,
    decoy: String,
}

/// What a hash costs.
#[derive(Clone, Copy, Debug)]
pub struct PasswordCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
}

impl Passwords {
    /// Argon2id with one lane.
    pub fn new(cost: PasswordCost) -> anyhow::Result<Self> {
        let params = Params::new(cost.memory_kib, cost.passes, 1, None)
            .map_err(|error| anyhow::anyhow!("argon2 parameters: {error}"))?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let decoy = hash(&argon2, "no password is ever equal to this decoy")?;
        Ok(Self { argon2, turns: Semaphore::new(HASHING_MAX), decoy })
    }

    /// The hash to store, in PHC format.
    pub async fn hash(&self, password: String) -> Result<String, Problem> {
        let argon2 = self.argon2.clone();
        let made = self.in_turn(move || hash(&argon2, &password)).await?;
        made.map_err(|error| {
            tracing::error!(%error, "a password could not be hashed");
            Problem::internal()
        })
    }

    /// Whether the password fits. Without a stored hash it takes as long and says no.
    pub async fn fits(&self, password: String, stored: Option<String>) -> Result<bool, Problem> {
        let argon2 = self.argon2.clone();
        let (known, stored) = stored.map_or_else(|| (false, self.decoy.clone()), |stored| (true, stored));
        let fits = move || {
            let parsed = PasswordHash::new(&stored);
            parsed.is_ok_and(|parsed| argon2.verify_password(password.as_bytes(), &parsed).is_ok())
        };
        Ok(self.in_turn(fits).await? && known)
    }

    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
        let turn = tokio::time::timeout(HASHING_WAIT_MAX, self.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(Problem::busy());
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Problem::internal())
    }
}

fn hash(argon2: &Argon2<'_>, password: &str) -> anyhow::Result<String> {
    let salt = SaltString::encode_b64(&random_bytes()[..16]).map_err(|error| anyhow::anyhow!("{error}"))?;
    let hash = argon2.hash_password(password.as_bytes(), &salt).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(hash.to_string())
}

/// Refuses a POST that another site's page made. Beside SameSite cookies, because old browsers ignore those.
pub async fn same_site(State(shop): State<Shared>, request: Request, next: Next) -> Response {
    let safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    // Webhooks prove themselves by their signature.
    if safe || request.uri().path().starts_with("/webhooks/") || from_here(request.headers(), &shop) {
        return next.run(request).await;
    }
    Problem::forbidden("This form was sent from another site.").into_response()
}

fn from_here(headers: &HeaderMap, shop: &Shared) -> bool {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(site) = text("sec-fetch-site") {
        return site == "same-origin" || site == "none";
    }
    match text("origin") {
        // Not a browser, or one that sends neither: then there is no cookie of a browser to be abused either.
        None => true,
        Some(origin) => {
            let host = text("host").unwrap_or_default();
            let named = origin.split_once("://").map(|(_, host)| host);
            named == Some(host) || shop.public_url.as_deref() == Some(origin)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_that_are_not_ours_are_no_session() {
        let parse = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, value.parse().expect("a header"));
            cookie(&headers)
        };
        let secret = URL_SAFE_NO_PAD.encode([7; 32]);
        assert_eq!(parse(&format!("a=b; sid=42.{secret}")), Some((UserId(42), sha256(&[&[7; 32]]))));
        let bad =
            [format!("sid=-42.{secret}"), format!("sid=0.{secret}"), format!("sid={secret}"), "sid=42.abc".into()];
        for bad in bad {
            assert_eq!(parse(&bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn passwords_fit_only_their_own_hash() {
        let passwords = Passwords::new(PasswordCost { memory_kib: 8, passes: 1 }).expect("parameters");
        let stored = passwords.hash("correct horse".into()).await.expect("hash");
        assert!(stored.starts_with("$argon2id$"));
        assert!(passwords.fits("correct horse".into(), Some(stored.clone())).await.expect("check"));
        assert!(!passwords.fits("wrong horse".into(), Some(stored)).await.expect("check"));
        assert!(!passwords.fits("x".into(), None).await.expect("check"));
        assert!(!passwords.fits("x".into(), Some("not a hash".into())).await.expect("check"));
    }
}
