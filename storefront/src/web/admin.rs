//! The owner's report: sales per day and best sellers, over all customers.
//!
//! Invariant: without a token it is open only where the shop listens on loopback alone.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use serde::Deserialize;
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::Shared;
use super::negotiate::Wants;
use super::pages::{self, Frame};
use super::problem::Problem;
use super::session::MaybeVisitor;
use crate::keys::sha256;
use crate::store::report;

const DAYS_MAX: i64 = 366;

/// Who may see the reports.
#[derive(Clone)]
pub enum Admin {
    /// Everyone who reaches the shop: it listens on loopback.
    Open,
    /// Who shows this token, as a bearer or as the password of Basic authentication.
    Token(String),
    /// Nobody.
    Closed,
}

/// How far back to look.
#[derive(Deserialize)]
pub struct Period {
    days: Option<i64>,
}

fn shown(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    if let Some(token) = value.strip_prefix("Bearer ") {
        return Some(token.to_owned());
    }
    let basic = base64::engine::general_purpose::STANDARD.decode(value.strip_prefix("Basic ")?).ok()?;
    String::from_utf8(basic).ok()?.split_once(':').map(|(_, password)| password.to_owned())
}

/// The report of the last days, 30 unless told otherwise.
pub async fn report(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    headers: HeaderMap,
    Query(period): Query<Period>,
) -> Result<Response, Problem> {
    match &shop.admin {
        Admin::Open => {}
        Admin::Closed => return Err(Problem::forbidden("The report needs an admin token, and none is configured.")),
        Admin::Token(token) => {
            let fits = shown(&headers).is_some_and(|shown| sha256(&[shown.as_bytes()]) == sha256(&[token.as_bytes()]));
            if !fits {
                let ask = [(header::WWW_AUTHENTICATE, "Basic realm=\"report\"")];
                return Ok((StatusCode::UNAUTHORIZED, ask, "The report needs the admin token.\n").into_response());
            }
        }
    }
    let days = period.days.unwrap_or(30).clamp(1, DAYS_MAX);
    let since = OffsetDateTime::now_utc().replace_time(time::Time::MIDNIGHT) - Duration::days(days - 1);
    let (per_day, sellers) = tokio::try_join!(report::days(&shop.db, since), report::best_sellers(&shop.db, since))?;
    match wants {
        Wants::Json => Ok(Json(json!({ "days": per_day, "best_sellers": sellers })).into_response()),
        Wants::Html => {
            let frame = Frame::load(&shop, visitor.as_ref(), "Sales report").await?;
            pages::report(frame, days, &per_day, &sellers)
        }
    }
}
