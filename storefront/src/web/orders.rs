//! Checkout, the way back from the payment page, and the customer's orders.
//!
//! Invariant: an order is shown only to the customer it belongs to, whoever knows its reference.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::account::line;
use super::negotiate::{Body, Wants};
use super::pages::{self, Frame};
use super::problem::Problem;
use super::session::{Customer, Visitor};
use super::{Shared, see_other};
use crate::checkout::{self, Outcome, Payment};
use crate::id::OrderRef;
use crate::keys::{hex, random_bytes};
use crate::money::Cents;
use crate::pay::{NewSession, PaymentStatus, Session};
use crate::store::orders::{self, Order, Status};
use crate::store::{cart, catalog};

const KEY_MAX: usize = 100;

/// The checkout form.
pub async fn checkout_form(State(shop): State<Shared>, Customer(visitor): Customer) -> Result<Response, Problem> {
    checkout_page(&shop, &visitor, None).await
}

async fn checkout_page(shop: &Shared, visitor: &Visitor, problem: Option<&str>) -> Result<Response, Problem> {
    let lines = cart::lines(&shop.db, visitor.user).await?;
    if lines.is_empty() {
        return Ok(see_other("/cart", None));
    }
    let frame = Frame::load(shop, Some(visitor), "Checkout").await?;
    pages::checkout(frame, visitor, &lines, &hex(&random_bytes()[..16]), problem)
}

/// What a customer agrees to.
#[derive(Deserialize)]
pub struct Agreement {
    ship_name: String,
    ship_address: String,
    idempotency_key: Option<String>,
    #[serde(default, deserialize_with = "pages::optional_number")]
    total_cents: Option<i64>,
}

/// Places the order and leads to the payment page.
pub async fn checkout(
    State(shop): State<Shared>,
    Customer(visitor): Customer,
    wants: Wants,
    headers: HeaderMap,
    Body(agreement): Body<Agreement>,
) -> Result<Response, Problem> {
    let header_key = headers.get("idempotency-key").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let key = header_key
        .or(agreement.idempotency_key)
        .filter(|key| (1..=KEY_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()));
    let request = checkout::Request {
        key: key.ok_or_else(|| Problem::invalid("An idempotency key of at most 100 letters or digits is needed."))?,
        ship_name: line(&agreement.ship_name, "a name", 80)?,
        ship_address: line(&agreement.ship_address, "an address", 400)?,
        agreed: agreement.total_cents.map(Cents),
    };
    let outcome = checkout::place(&shop.db, visitor.user, &request, shop.hold_for).await?;
    let refusal = match &outcome {
        Outcome::Placed(order) => {
            shop.bell.notify_one();
            return lead_to_payment(&shop, *order, wants, &headers).await;
        }
        Outcome::EmptyCart => Problem::conflict("empty_cart", "Your cart is empty."),
        Outcome::SoldOut(name) => {
            Problem::conflict("sold_out", &format!("“{name}” is sold out in this quantity. Please change your cart."))
        }
        Outcome::CartChanged => {
            Problem::conflict("cart_changed", "Your cart or its prices changed. Please check it again.")
        }
        Outcome::KeyMisused => {
            let mut problem = Problem::invalid("This idempotency key belongs to a different order.");
            problem.code = "key_misused";
            problem
        }
    };
    if wants == Wants::Json || outcome == Outcome::EmptyCart || outcome == Outcome::KeyMisused {
        return Err(refusal);
    }
    let mut page = checkout_page(&shop, &visitor, Some(&refusal.message)).await?;
    if page.status() == StatusCode::OK {
        *page.status_mut() = refusal.status;
    }
    Ok(page)
}

/// The address customers reach this shop at.
fn base_url(shop: &Shared, headers: &HeaderMap) -> Result<String, Problem> {
    if let Some(url) = &shop.public_url {
        return Ok(url.clone());
    }
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let plain = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
    if plain { Ok(format!("http://{host}")) } else { Err(Problem::bad_request("The Host header is missing.")) }
}

async fn payment_session(
    shop: &Shared,
    order: OrderRef,
    total: Cents,
    headers: &HeaderMap,
) -> Result<Session, Problem> {
    let reference = order.encode(&shop.keys);
    let base = base_url(shop, headers)?;
    let session = shop
        .provider
        .open(NewSession {
            success_url: format!("{base}/checkout/return/{reference}"),
            cancel_url: format!("{base}/orders/{reference}"),
            client_reference_id: reference,
            amount_total: total,
            currency: "usd".into(),
        })
        .await?;
    orders::note_payment(&shop.db, order, &session.id, total).await?;
    Ok(session)
}

/// After the order is placed: on to the payment page, or to the order if there is nothing left to pay.
async fn lead_to_payment(
    shop: &Shared,
    order: OrderRef,
    wants: Wants,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let reference = order.encode(&shop.keys);
    let found = orders::get(&shop.db, order).await?.ok_or_else(|| Problem::not_found("order"))?;
    let payable = found.status == Status::Pending;
    let session = if payable { payment_session(shop, order, found.total, headers).await.map(Some) } else { Ok(None) };
    match (wants, session) {
        (Wants::Html, Ok(Some(session))) => Ok(see_other(&session.url, None)),
        // The order stands. Its page offers to pay once more.
        (Wants::Html, Ok(None) | Err(_)) => Ok(see_other(&format!("/orders/{reference}"), None)),
        (Wants::Json, session) => {
            let payment_url = session.ok().flatten().map(|session| session.url);
            let body = json!({
                "order": reference, "status": found.status, "total_cents": found.total, "payment_url": payment_url,
            });
            Ok((StatusCode::CREATED, Json(body)).into_response())
        }
    }
}

fn own(shop: &Shared, visitor: &Visitor, reference: &str) -> Result<OrderRef, Problem> {
    let order = OrderRef::decode(reference, &shop.keys).filter(|order| order.user == visitor.user);
    order.ok_or_else(|| Problem::not_found("order"))
}

/// Opens the payment page of an order that is not paid yet.
pub async fn pay(
    State(shop): State<Shared>,
    Customer(visitor): Customer,
    wants: Wants,
    headers: HeaderMap,
    Path(reference): Path<String>,
) -> Result<Response, Problem> {
    let order = own(&shop, &visitor, &reference)?;
    let found = orders::get(&shop.db, order).await?.ok_or_else(|| Problem::not_found("order"))?;
    if found.status != Status::Pending {
        return Err(Problem::conflict("not_payable", "This order is not waiting for a payment."));
    }
    let session = payment_session(&shop, order, found.total, &headers).await?;
    match wants {
        Wants::Html => Ok(see_other(&session.url, None)),
        Wants::Json => Ok(Json(json!({ "order": reference, "payment_url": session.url })).into_response()),
    }
}

/// The customer returns. If the webhook has not come yet, the shop asks the provider itself.
pub async fn back_from_payment(State(shop): State<Shared>, Path(reference): Path<String>) -> Result<Response, Problem> {
    let order = OrderRef::decode(&reference, &shop.keys).ok_or_else(|| Problem::not_found("order"))?;
    let found = orders::get(&shop.db, order).await?.ok_or_else(|| Problem::not_found("order"))?;
    if matches!(found.status, Status::Pending | Status::Expired) {
        for known in orders::payments(&shop.db, order).await? {
            // The page must not fail because the provider does: the webhook will come.
            let Ok(session) = shop.provider.get(&known.provider_ref).await else { continue };
            if session.payment_status == PaymentStatus::Paid && session.client_reference_id == reference {
                let amount = session.amount_total;
                let payment = Payment { order, provider_ref: session.id, amount, event_id: None };
                checkout::settle(&shop.db, &payment).await?;
                shop.bell.notify_one();
            }
        }
    }
    Ok(see_other(&format!("/orders/{reference}"), None))
}

fn described(shop: &Shared, visitor: &Visitor, order: &Order) -> Value {
    let reference = OrderRef { user: visitor.user, order: order.id }.encode(&shop.keys);
    let created = order.created_at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    json!({ "order": reference, "status": order.status, "total_cents": order.total, "created_at": created })
}

/// The customer's latest orders.
pub async fn history(
    State(shop): State<Shared>,
    Customer(visitor): Customer,
    wants: Wants,
) -> Result<Response, Problem> {
    let history = orders::history(&shop.db, visitor.user).await?;
    match wants {
        Wants::Json => {
            let list: Vec<Value> = history.iter().map(|order| described(&shop, &visitor, order)).collect();
            Ok(Json(json!({ "orders": list })).into_response())
        }
        Wants::Html => {
            let frame = Frame::load(&shop, Some(&visitor), "Your orders").await?;
            let references =
                history.iter().map(|order| OrderRef { user: visitor.user, order: order.id }.encode(&shop.keys));
            pages::orders(frame, &history, references.collect())
        }
    }
}

/// One order with its lines and events.
pub async fn show(
    State(shop): State<Shared>,
    Customer(visitor): Customer,
    wants: Wants,
    Path(reference): Path<String>,
) -> Result<Response, Problem> {
    let order = own(&shop, &visitor, &reference)?;
    let found = orders::get(&shop.db, order).await?.ok_or_else(|| Problem::not_found("order"))?;
    let (items, events) = tokio::try_join!(orders::items(&shop.db, order), orders::events(&shop.db, order))?;
    match wants {
        Wants::Json => {
            let mut body = described(&shop, &visitor, &found);
            body["items"] = json!(items);
            body["events"] = json!(events);
            Ok(Json(body).into_response())
        }
        Wants::Html => {
            let products: Vec<_> = items.iter().map(|item| item.product_id).collect();
            let frame = Frame::load(&shop, Some(&visitor), "Your order").await?;
            // Only to draw the same pictures as everywhere else.
            let mut categories = Vec::with_capacity(products.len());
            for product in products {
                categories.push(catalog::product(&shop.db, product).await?.map(|product| product.category_id));
            }
            pages::order(frame, &reference, &found, (&items, &categories), &events)
        }
    }
}
