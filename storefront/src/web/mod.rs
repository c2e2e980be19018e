//! The shop over HTTP: pages for browsers and the same as JSON, from the same handlers.
//!
//! Invariant: every answer carries the security headers, every failure goes through `problem`. Non-goal: any state in this
//! process that another instance would miss.

pub mod account;
pub mod admin;
pub mod assets;
pub mod cart;
pub mod health;
pub mod negotiate;
pub mod orders;
pub mod pages;
pub mod problem;
pub mod session;
pub mod shop;
pub mod tile;
pub mod webhook;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::sync::Notify;

use crate::keys::Keys;
use crate::pay::PaymentProvider;
use crate::store::Db;
use admin::Admin;
use assets::Assets;
use negotiate::Wants;
use problem::Problem;
use session::Passwords;

const BODY_MAX: usize = 64 * 1024;

/// What the handlers share.
pub struct Shop {
    /// The database.
    pub db: Db,
    /// The shop's keys.
    pub keys: Keys,
    /// Who takes the money.
    pub provider: Arc<dyn PaymentProvider>,
    /// Hashes passwords.
    pub passwords: Passwords,
    /// Styles, script and icon.
    pub assets: Assets,
    /// How long stock is reserved for an unpaid order.
    pub hold_for: Duration,
    /// The address customers use, if it differs from the Host header's.
    pub public_url: Option<String>,
    /// Whether cookies are for HTTPS only.
    pub secure_cookies: bool,
    /// Who may see the reports.
    pub admin: Admin,
    /// Where the payment page is; the only foreign place our forms may lead to.
    pub payment_origin: String,
    /// Wakes the outbox worker.
    pub bell: Arc<Notify>,
}

/// The state as axum passes it.
pub type Shared = Arc<Shop>;

/// All routes.
pub fn router(shop: Shared) -> Router {
    Router::new()
        .route("/", get(shop::home))
        .route("/category/{slug}", get(shop::category))
        .route("/search", get(shop::search))
        .route("/product/{id}", get(shop::product))
        .route("/cart", get(cart::show).post(cart::add))
        .route("/cart/update", post(cart::update))
        .route("/register", get(account::register_form).post(account::register))
        .route("/login", get(account::login_form).post(account::login))
        .route("/logout", post(account::logout))
        .route("/account", get(account::show).post(account::rename))
        .route("/checkout", get(orders::checkout_form).post(orders::checkout))
        .route("/checkout/return/{reference}", get(orders::back_from_payment))
        .route("/orders", get(orders::history))
        .route("/orders/{reference}", get(orders::show))
        .route("/orders/{reference}/pay", post(orders::pay))
        .route("/admin/report", get(admin::report))
        .route("/webhooks/payments", post(webhook::receive))
        .route("/healthz", get(health::show))
        .route("/assets/{name}", get(assets::serve))
        .route("/favicon.ico", get(assets::icon))
        .fallback(async || Problem::not_found("page"))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&shop), session::same_site))
        .layer(middleware::from_fn_with_state(Arc::clone(&shop), finish))
        .with_state(shop)
}

/// Turns problems into what the client wants and adds the headers that every answer has.
async fn finish(State(shop): State<Shared>, request: Request, next: Next) -> Response {
    let wants = Wants::of(request.headers());
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        let cookies = response.headers_mut().remove(header::SET_COOKIE);
        response = problem.render(wants, |problem| pages::problem(&shop, problem));
        if let Some(cookies) = cookies {
            response.headers_mut().insert(header::SET_COOKIE, cookies);
        }
    }
    let policy = format!(
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; \
         form-action 'self' {}; base-uri 'none'; frame-ancestors 'none'",
        shop.payment_origin
    );
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("private, no-cache"));
    headers.insert(header::VARY, HeaderValue::from_static("accept, cookie"));
    response
}

/// A redirect after a form, with a cookie if the session changed.
pub(crate) fn see_other(target: &str, cookie: Option<HeaderValue>) -> Response {
    let response = axum::response::Redirect::to(target).into_response();
    with_cookie(response, cookie)
}

pub(crate) fn with_cookie(mut response: Response, cookie: Option<HeaderValue>) -> Response {
    if let Some(cookie) = cookie {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

/// A place on this site, or the front page: never another site.
pub(crate) fn local_path(next: Option<&str>) -> &str {
    next.filter(|path| {
        path.starts_with('/')
            && !path.starts_with("//")
            && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\')
    })
    .unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_here() {
        assert_eq!(local_path(Some("/checkout")), "/checkout");
        for elsewhere in ["//evil.example", "https://evil.example", "/\\evil.example", "", "x", "/a\r\nb", "/\t/evil"] {
            assert_eq!(local_path(Some(elsewhere)), "/", "{elsewhere:?}");
        }
        assert_eq!(local_path(None), "/");
    }
}
