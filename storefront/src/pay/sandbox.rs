//! The sandbox payment provider: an HTTP service of its own that behaves like a real one, with play money.
//!
//! Invariant: it talks to the shop only over HTTP, with the bearer key in one direction and signed webhooks in the other.
//! Bounds: `SESSIONS_MAX` sessions in memory, the oldest unpaid go first; `DELIVERIES_MAX` attempts per webhook.
//! Non-goals: durability, and card data of real people: it remembers only the last four digits.
//!
//! Cards: `4000 0000 0000 0002` is declined, `4000 0000 0000 9995` has insufficient funds, every other number with a
//! correct check digit pays.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use askama::Template as _;
use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::webhook::{self, Event, EventData};
use super::{NewSession, PaymentStatus, Session};
use crate::web::negotiate::{Body, Wants};

const SESSIONS_MAX: usize = 20_000;
const DELIVERIES_MAX: u32 = 6;
const DELIVERY_MAX: Duration = Duration::from_secs(10);

/// The sandbox's state.
pub struct Sandbox {
    key: String,
    webhook_key: Vec<u8>,
    webhook_url: String,
    public_url: String,
    client: reqwest::Client,
    sessions: Mutex<Sessions>,
}

#[derive(Default)]
struct Sessions {
    by_id: HashMap<String, Entry>,
    by_reference: HashMap<String, String>,
}

#[derive(Clone)]
struct Entry {
    session: Session,
    new: NewSession,
    opened: OffsetDateTime,
}

#[derive(askama::Template)]
#[template(path = "pay.html")]
struct PayPage<'a> {
    session: &'a Session,
    cancel_url: &'a str,
    problem: &'a str,
    style: &'static str,
}

/// Where the sandbox is reached and where it reports to.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// The address customers reach the sandbox at, without a slash at its end.
    pub public_url: String,
    /// Where webhooks go.
    pub webhook_url: String,
}

/// The sandbox's routes.
pub fn router(keys: &crate::keys::Keys, addresses: Addresses) -> anyhow::Result<Router> {
    let sandbox = Sandbox {
        key: keys.provider().to_owned(),
        webhook_key: keys.webhook().to_vec(),
        webhook_url: addresses.webhook_url,
        public_url: addresses.public_url,
        client: reqwest::Client::builder().timeout(DELIVERY_MAX).no_proxy().build()?,
        sessions: Mutex::default(),
    };
    Ok(Router::new()
        .route("/v1/checkout/sessions", post(open))
        .route("/v1/checkout/sessions/{id}", get(show))
        .route("/v1/refunds", post(refund))
        .route("/pay/{id}", get(page).post(pay))
        .route("/healthz", get(|| async { Json(json!({ "status": "ok" })) }))
        .layer(axum::extract::DefaultBodyLimit::max(16 * 1024))
        .with_state(Arc::new(sandbox)))
}

impl Sandbox {
    fn allows(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Compared through a MAC, which takes the same time wherever the first difference is.
        let mac = |text: &str| crate::keys::hmac_sha256(&self.webhook_key, &[text.as_bytes()]);
        mac(token) == mac(&self.key)
    }

    fn find(&self, id: &str) -> Option<Entry> {
        self.sessions.lock().by_id.get(id).cloned()
    }

    /// Sets a session's status. None: no such session, or it was not in `from`.
    fn move_on(&self, id: &str, from: PaymentStatus, to: PaymentStatus) -> Option<Entry> {
        let mut sessions = self.sessions.lock();
        let entry = sessions.by_id.get_mut(id).filter(|entry| entry.session.payment_status == from)?;
        entry.session.payment_status = to;
        Some(entry.clone())
    }

    /// Sends a webhook: once at once, and if that fails again in the background, ever more slowly.
    async fn notify(self: &Arc<Self>, kind: &str, session: Session, failure: Option<&str>) {
        let event = Event {
            id: format!("evt_{}", Uuid::now_v7().simple()),
            kind: kind.to_owned(),
            created: OffsetDateTime::now_utc().unix_timestamp(),
            data: EventData { object: session, failure: failure.map(str::to_owned) },
        };
        let Ok(body) = serde_json::to_vec(&event) else { return };
        let sandbox = Arc::clone(self);
        let first = tokio::spawn(async move {
            if sandbox.deliver(&body).await {
                return None;
            }
            Some((sandbox, body))
        });
        let Ok(Some((sandbox, body))) = first.await else { return };
        tokio::spawn(async move {
            for attempt in 1..DELIVERIES_MAX {
                tokio::time::sleep(Duration::from_millis(250) * 4_u32.pow(attempt - 1)).await;
                if sandbox.deliver(&body).await {
                    return;
                }
            }
            tracing::warn!(event = event.id, "a webhook could not be delivered; the shop can still ask");
        });
    }

    async fn deliver(&self, body: &[u8]) -> bool {
        let signature = webhook::sign(&self.webhook_key, body, OffsetDateTime::now_utc().unix_timestamp());
        let request = self
            .client
            .post(&self.webhook_url)
            .header(webhook::HEADER, signature)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.to_vec());
        request.send().await.is_ok_and(|answer| answer.status().is_success())
    }
}

fn problem(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({ "error": { "code": code, "message": message } }))).into_response()
}

fn denied() -> Response {
    problem(StatusCode::UNAUTHORIZED, "unauthorized", "no valid bearer key")
}

async fn open(State(sandbox): State<Arc<Sandbox>>, headers: HeaderMap, Json(new): Json<NewSession>) -> Response {
    if !sandbox.allows(&headers) {
        return denied();
    }
    if new.amount_total.0 < 0 || new.client_reference_id.is_empty() || new.client_reference_id.len() > 200 {
        return problem(StatusCode::BAD_REQUEST, "invalid_request", "a reference and an amount are required");
    }
    let mut sessions = sandbox.sessions.lock();
    if let Some(known) = sessions.by_reference.get(&new.client_reference_id).and_then(|id| sessions.by_id.get(id)) {
        return if known.new.amount_total == new.amount_total {
            Json(known.session.clone()).into_response()
        } else {
            problem(StatusCode::CONFLICT, "idempotency_error", "this reference has a session of another amount")
        };
    }
    if sessions.by_id.len() >= SESSIONS_MAX {
        let oldest = sessions.by_id.values().min_by_key(|entry| entry.opened).map(|entry| entry.session.clone());
        if let Some(oldest) = oldest {
            sessions.by_id.remove(&oldest.id);
            sessions.by_reference.remove(&oldest.client_reference_id);
        }
    }
    let id = format!("cs_{}", Uuid::new_v4().simple());
    let session = Session {
        url: format!("{}/pay/{id}", sandbox.public_url),
        client_reference_id: new.client_reference_id.clone(),
        amount_total: new.amount_total,
        currency: new.currency.clone(),
        payment_status: PaymentStatus::Unpaid,
        id: id.clone(),
    };
    sessions.by_reference.insert(new.client_reference_id.clone(), id.clone());
    sessions.by_id.insert(id, Entry { session: session.clone(), new, opened: OffsetDateTime::now_utc() });
    Json(session).into_response()
}

async fn show(State(sandbox): State<Arc<Sandbox>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    if !sandbox.allows(&headers) {
        return denied();
    }
    match sandbox.find(&id) {
        Some(entry) => Json(entry.session).into_response(),
        None => problem(StatusCode::NOT_FOUND, "resource_missing", "no such session"),
    }
}

#[derive(Deserialize)]
struct RefundRequest {
    session: String,
}

async fn refund(
    State(sandbox): State<Arc<Sandbox>>,
    headers: HeaderMap,
    Json(wanted): Json<RefundRequest>,
) -> Response {
    if !sandbox.allows(&headers) {
        return denied();
    }
    sandbox.move_on(&wanted.session, PaymentStatus::Paid, PaymentStatus::Refunded);
    match sandbox.find(&wanted.session).map(|entry| entry.session.payment_status) {
        Some(PaymentStatus::Refunded) => Json(json!({ "status": "succeeded" })).into_response(),
        Some(_) => problem(StatusCode::BAD_REQUEST, "charge_missing", "nothing was charged"),
        None => problem(StatusCode::NOT_FOUND, "resource_missing", "no such session"),
    }
}

/// What a customer enters on the payment page.
#[derive(Deserialize)]
struct Card {
    card: String,
}

/// What the sandbox's bank says to a card number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Charge,
    Decline(&'static str, &'static str),
    NotACard,
}

fn judge(number: &str) -> Verdict {
    let digits: Vec<u32> =
        number.chars().filter(|letter| !" -".contains(*letter)).map_while(|c| c.to_digit(10)).collect();
    let all = number.chars().all(|letter| letter.is_ascii_digit() || " -".contains(letter));
    let luhn: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(at, digit)| if at % 2 == 1 { digit * 2 / 10 + digit * 2 % 10 } else { *digit })
        .sum();
    if !all || !(12..=19).contains(&digits.len()) || !luhn.is_multiple_of(10) {
        return Verdict::NotACard;
    }
    let plain: String = digits.iter().filter_map(|digit| char::from_digit(*digit, 10)).collect();
    match plain.as_str() {
        "4000000000000002" => Verdict::Decline("card_declined", "Your card was declined."),
        "4000000000009995" => Verdict::Decline("insufficient_funds", "Your card has insufficient funds."),
        _ => Verdict::Charge,
    }
}

fn pay_page(entry: &Entry, problem: &str) -> Response {
    let page = PayPage {
        session: &entry.session,
        cancel_url: &entry.new.cancel_url,
        problem,
        style: include_str!("../../assets/pay.css"),
    };
    match page.render() {
        Ok(html) => {
            let headers = [(header::CACHE_CONTROL, "no-store"), (header::REFERRER_POLICY, "no-referrer")];
            (headers, Html(html)).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn page(State(sandbox): State<Arc<Sandbox>>, Path(id): Path<String>) -> Response {
    match sandbox.find(&id) {
        Some(entry) if entry.session.payment_status == PaymentStatus::Unpaid => pay_page(&entry, ""),
        Some(entry) => Redirect::to(&entry.new.success_url).into_response(),
        None => problem(StatusCode::NOT_FOUND, "resource_missing", "no such payment"),
    }
}

async fn pay(
    State(sandbox): State<Arc<Sandbox>>,
    Path(id): Path<String>,
    wants: Wants,
    Body(card): Body<Card>,
) -> Response {
    let Some(entry) = sandbox.find(&id) else {
        return problem(StatusCode::NOT_FOUND, "resource_missing", "no such payment");
    };
    match judge(&card.card) {
        Verdict::Charge => {
            // Only one of several submissions charges; all of them end at the shop.
            if let Some(paid) = sandbox.move_on(&id, PaymentStatus::Unpaid, PaymentStatus::Paid) {
                sandbox.notify(webhook::COMPLETED, paid.session, None).await;
            }
            match wants {
                Wants::Json => Json(json!({ "status": "paid", "return_url": entry.new.success_url })).into_response(),
                Wants::Html => Redirect::to(&entry.new.success_url).into_response(),
            }
        }
        Verdict::Decline(code, message) => {
            sandbox.notify(webhook::FAILED, entry.session.clone(), Some(code)).await;
            match wants {
                Wants::Json => problem(StatusCode::PAYMENT_REQUIRED, code, message),
                Wants::Html => pay_page(&entry, message),
            }
        }
        Verdict::NotACard => match wants {
            Wants::Json => problem(StatusCode::UNPROCESSABLE_ENTITY, "incorrect_number", "not a card number"),
            Wants::Html => pay_page(&entry, "This is not a card number."),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_pay_decline_or_are_none() {
        for good in ["4242 4242 4242 4242", "4242424242424242", "5555-5555-5555-4444", "378282246310005"] {
            assert_eq!(judge(good), Verdict::Charge, "{good}");
        }
        assert!(matches!(judge("4000 0000 0000 0002"), Verdict::Decline("card_declined", _)));
        assert!(matches!(judge("4000000000009995"), Verdict::Decline("insufficient_funds", _)));
        for bad in ["", "4242 4242 4242 4241", "0", "hello", "4242 4242 4242 4242x", "٤٢٤٢٤٢٤٢٤٢٤٢٤٢٤٢"]
        {
            assert_eq!(judge(bad), Verdict::NotACard, "{bad}");
        }
    }
}
