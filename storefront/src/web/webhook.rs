//! Where the payment provider's messages arrive.
//!
//! Invariant: nothing in the body is believed, or even parsed, before its signature fits. The answer 2xx means "never send
//! this again", so it is given only when the effect is committed or there can be none.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use time::OffsetDateTime;

use super::Shared;
use super::problem::Problem;
use crate::checkout::{self, Payment};
use crate::id::OrderRef;
use crate::pay::webhook;

/// Takes one message.
pub async fn receive(State(shop): State<Shared>, headers: HeaderMap, body: Bytes) -> Result<StatusCode, Problem> {
    let header = headers.get(webhook::HEADER).and_then(|value| value.to_str().ok());
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let event = webhook::verify(shop.keys.webhook(), header, &body, now).map_err(|reject| {
        tracing::warn!(%reject, "a webhook was refused");
        Problem::bad_request("The message is not acceptable.")
    })?;
    let session = event.data.object;
    let Some(order) = OrderRef::decode(&session.client_reference_id, &shop.keys) else {
        tracing::warn!(event = event.id, "a webhook names no order of this shop");
        return Ok(StatusCode::ACCEPTED);
    };
    let payment = Payment { order, provider_ref: session.id, amount: session.amount_total, event_id: Some(event.id) };
    match event.kind.as_str() {
        webhook::COMPLETED => {
            let settled = checkout::settle(&shop.db, &payment).await?;
            tracing::info!(order = %order.order, ?settled, "a payment was reported");
            shop.bell.notify_one();
        }
        webhook::FAILED => {
            let reason = event.data.failure.unwrap_or_else(|| "declined".into());
            checkout::declined(&shop.db, &payment, &reason).await?;
        }
        other => tracing::debug!(kind = other, "a webhook of a kind that needs nothing done"),
    }
    Ok(StatusCode::OK)
}
