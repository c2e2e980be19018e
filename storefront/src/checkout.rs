//! The purchase as a saga of small transactions, each on the rows of one user or one product.
//!
//! ```text
//! place:   bind key → order id · hold each product · order + lines + event + outbox, cart emptied
//! settle:  sell each product (hold → sold, or late from what is left) · order paid + event + outbox
//!          one product gone: order refunded + outbox, whose worker returns the money and the stock
//! expire:  order expired + event · release each hold
//! ```
//!
//! Invariant: an order is paid only if every unit of it was taken from stock first, and it is paid once, whichever of
//! webhooks, returns from the payment page and retries arrive, in whatever order and number. A crash between any two steps
//! leaves something that a repetition, the sweeper or the outbox finishes.

use std::time::Duration;

use serde_json::json;

use crate::id::{OrderId, OrderRef, UserId};
use crate::keys::sha256;
use crate::money::Cents;
use crate::store::orders::{Bound, Placed, Status};
use crate::store::outbox::Topic;
use crate::store::stock::{HoldState, Taken, Want};
use crate::store::{Db, StoreError, cart, orders, stock};

/// What a customer agreed to.
#[derive(Clone, Debug)]
pub struct Request {
    /// Chosen by the client, the same for every repetition of one purchase.
    pub key: String,
    /// The recipient.
    pub ship_name: String,
    /// Where to send it.
    pub ship_address: String,
    /// The total the customer saw; none: whatever it is now.
    pub agreed: Option<Cents>,
}

/// How a checkout ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The order stands, now or from an equal earlier request.
    Placed(OrderRef),
    /// There is nothing to buy.
    EmptyCart,
    /// A product has fewer units left than wanted; nothing is reserved.
    SoldOut(String),
    /// Prices or lines changed since the customer looked; nothing is reserved.
    CartChanged,
    /// The key belongs to a different purchase.
    KeyMisused,
}

/// Places an order from the user's cart.
pub async fn place(db: &Db, user: UserId, request: &Request, hold_for: Duration) -> Result<Outcome, StoreError> {
    let agreed = request.agreed.map_or_else(Vec::new, |cents| cents.0.to_be_bytes().to_vec());
    let hash = sha256(&[request.ship_name.as_bytes(), request.ship_address.as_bytes(), &agreed]);
    let order = match orders::bind_key(db, user, &request.key, &hash).await? {
        Bound::To(order) => OrderRef { user, order },
        Bound::Misused => return Ok(Outcome::KeyMisused),
    };
    if orders::get(db, order).await?.is_some() {
        return Ok(Outcome::Placed(order));
    }
    let lines = cart::lines(db, user).await?;
    let total = cart::total(&lines);
    if lines.is_empty() {
        // An equal request may have turned the cart into the order since the look above.
        let placed = orders::get(db, order).await?.is_some();
        return Ok(if placed { Outcome::Placed(order) } else { Outcome::EmptyCart });
    }
    if request.agreed.is_some_and(|agreed| agreed != total) {
        return Ok(Outcome::CartChanged);
    }
    let wants: Vec<Want> = lines.iter().map(|line| Want { product: line.product_id, qty: line.qty }).collect();
    for (line, want) in lines.iter().zip(&wants) {
        let taken = stock::hold(db, user, order.order, *want, hold_for).await?;
        if taken != Taken::Yes {
            return give_up(
                db,
                order,
                &wants,
                match taken {
                    Taken::OtherQuantity => Outcome::CartChanged,
                    _ => Outcome::SoldOut(line.name.clone()),
                },
            )
            .await;
        }
    }
    let details = json!({ "ship_name": request.ship_name, "ship_address": request.ship_address });
    match orders::place(db, order, &wants, total, &details).await? {
        Placed::Now(_) | Placed::Before => Ok(Outcome::Placed(order)),
        Placed::CartChanged => give_up(db, order, &wants, Outcome::CartChanged).await,
    }
}

/// Releases what was reserved, unless an equal request has placed the order after all: then its holds must stand.
async fn give_up(db: &Db, order: OrderRef, wants: &[Want], why: Outcome) -> Result<Outcome, StoreError> {
    if orders::get(db, order).await?.is_some() {
        return Ok(Outcome::Placed(order));
    }
    for want in wants {
        stock::release(db, want.product, order.order, HoldState::Held).await?;
    }
    Ok(why)
}

/// What the payment provider says of a payment session.
#[derive(Clone, Debug)]
pub struct Payment {
    /// The order it is for.
    pub order: OrderRef,
    /// The provider's id of the session.
    pub provider_ref: String,
    /// What was charged.
    pub amount: Cents,
    /// The provider's id of this message; none when the shop asked by itself.
    pub event_id: Option<String>,
}

/// What a payment message led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The order is paid, now or before.
    Paid,
    /// The money goes back.
    Refunded,
    /// There is no such order.
    Unknown,
}

/// A payment succeeded: the order becomes paid, or the money goes back.
pub async fn settle(db: &Db, payment: &Payment) -> Result<Settled, StoreError> {
    let Some(order) = orders::get(db, payment.order).await? else {
        return Ok(Settled::Unknown);
    };
    let fits = payment.amount == order.total;
    let items = orders::items(db, payment.order).await?;
    let mut all_sold = fits;
    if fits && order.status.may_become(Status::Paid) {
        for item in &items {
            if stock::sell(db, payment.order.user, order.id, item.want()).await? != Taken::Yes {
                all_sold = false;
                break;
            }
        }
    }
    let settled = conclude(db, payment, all_sold).await?;
    if settled == Settled::Refunded {
        tracing::warn!(order = %order.id, fits, "a payment goes back");
    }
    Ok(settled)
}

/// The order's own transaction: whichever message comes first decides, the others find it decided.
async fn conclude(db: &Db, payment: &Payment, all_sold: bool) -> Result<Settled, StoreError> {
    let Some(mut order) = orders::lock(db, payment.order).await? else {
        return Ok(Settled::Unknown);
    };
    if let Some(event) = &payment.event_id
        && !order.webhook(event).await?
    {
        let paid = order.status == Status::Paid;
        order.rollback().await?;
        return Ok(if paid { Settled::Paid } else { Settled::Refunded });
    }
    let reference = payment.provider_ref.as_str();
    match order.payment_state(reference).await?.as_deref() {
        Some("paid") => return order.rollback().await.map(|()| Settled::Paid),
        Some("refund_due" | "refunded") => return order.rollback().await.map(|()| Settled::Refunded),
        _ => {}
    }
    let data = json!({ "payment": reference, "amount_cents": payment.amount });
    let work = json!({ "order_id": payment.order.order, "payment": reference, "amount_cents": payment.amount });
    let settled = if all_sold && order.become_status(Status::Paid).await? {
        order.payment(reference, payment.amount, "paid").await?;
        order.event("paid", &data).await?;
        order.outbox(Topic::OrderPaid, &work).await?;
        Settled::Paid
    } else {
        // Also a second payment for an order that is paid: then the order stays, and only this money goes back.
        if order.become_status(Status::Refunded).await? {
            order.event("refunded", &data).await?;
        }
        order.payment(reference, payment.amount, "refund_due").await?;
        order.outbox(Topic::PaymentRefund, &work).await?;
        Settled::Refunded
    };
    order.commit().await?;
    Ok(settled)
}

/// A payment was declined: the order stays, the customer may try another card.
pub async fn declined(db: &Db, payment: &Payment, reason: &str) -> Result<(), StoreError> {
    let Some(mut order) = orders::lock(db, payment.order).await? else {
        return Ok(());
    };
    if let Some(event) = &payment.event_id
        && !order.webhook(event).await?
    {
        return order.rollback().await;
    }
    order.event("payment_failed", &json!({ "payment": payment.provider_ref, "reason": reason })).await?;
    order.commit().await
}

/// An order was not paid in time. Its holds are released by the caller, after this: never the other way round, or a
/// payment could find an order that still seems to have them.
pub async fn expire(db: &Db, user: UserId, order: OrderId) -> Result<(), StoreError> {
    let Some(mut order) = orders::lock(db, OrderRef { user, order }).await? else {
        return Ok(());
    };
    if order.become_status(Status::Expired).await? {
        order.event("expired", &json!({})).await?;
        return order.commit().await;
    }
    order.rollback().await
}
