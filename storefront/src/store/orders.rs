//! Orders, their lines, events and payments: rows of one user.
//!
//! Invariant: whoever changes an order or adds an event holds the order's row lock, so that statuses move only along
//! `Status::may_become` and event versions have no gaps.

use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_postgres::Row;

use super::outbox::{self, Topic};
use super::stock::Want;
use super::{Db, StoreError, Tx, sql};
use crate::id::{OrderId, OrderRef, ProductId, UserId};
use crate::money::Cents;

/// Where an order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Stock is reserved, payment is awaited.
    Pending,
    /// Paid for; its stock is sold.
    Paid,
    /// Not paid in time; its stock is free again.
    Expired,
    /// Paid too late for the stock to be there: the money goes back.
    Refunded,
}

impl Status {
    const ALL: [Self; 4] = [Self::Pending, Self::Paid, Self::Expired, Self::Refunded];

    /// Its name in the table and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Paid => "paid",
            Self::Expired => "expired",
            Self::Refunded => "refunded",
        }
    }

    fn parse(text: &str) -> Self {
        // Unknown: a newer version wrote it. Refunded is the status that allows nothing further.
        Self::ALL.into_iter().find(|status| status.as_str() == text).unwrap_or(Self::Refunded)
    }

    /// The whole state machine.
    pub fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Pending, Self::Paid | Self::Expired | Self::Refunded) | (Self::Expired, Self::Paid | Self::Refunded)
        )
    }

    /// What a customer reads.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pending => "Awaiting payment",
            Self::Paid => "Paid",
            Self::Expired => "Expired",
            Self::Refunded => "Refunded",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An order without its lines.
#[derive(Clone, Debug)]
pub struct Order {
    /// Which of the user's orders.
    pub id: OrderId,
    /// Where it stands.
    pub status: Status,
    /// What its lines cost together.
    pub total: Cents,
    /// When it was placed.
    pub created_at: OffsetDateTime,
}

/// One line of an order, as it was when the order was placed.
#[derive(Clone, Debug, Serialize)]
pub struct Item {
    /// The product.
    pub product_id: ProductId,
    /// Its name then.
    pub name: String,
    /// How many.
    pub qty: i32,
    /// Price of one then, in cents.
    pub price_cents: Cents,
}

impl Item {
    /// What the line took from stock.
    pub fn want(&self) -> Want {
        Want { product: self.product_id, qty: self.qty }
    }
}

/// Something that happened to an order.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// What: `placed`, `payment_failed`, `paid`, `receipt_sent`, `expired`, `refunded`.
    pub kind: String,
    /// Its particulars.
    pub data: Value,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

/// A payment session at the provider.
#[derive(Clone, Debug)]
pub struct Payment {
    /// The provider's id of the session.
    pub provider_ref: String,
    /// Its state: `open`, `paid`, `refund_due`, `refunded`.
    pub state: String,
}

/// How placing an order ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It is placed now.
    Now(Cents),
    /// An earlier request with the same key had placed it.
    Before,
    /// The cart is no longer the one that stock was reserved for.
    CartChanged,
}

/// What an order id is bound to before anything is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// To this request, or to an equal earlier one.
    To(OrderId),
    /// The key was used for a different request.
    Misused,
}

/// Binds a request key to an order id, in a transaction of its own.
pub async fn bind_key(db: &Db, user: UserId, key: &str, request_hash: &[u8]) -> Result<Bound, StoreError> {
    let fresh = OrderId::now();
    if db.change(sql::KEY_CLAIM, &[&user.0, &key, &request_hash, &fresh.0]).await? == 1 {
        return Ok(Bound::To(fresh));
    }
    let row = db.read_opt(sql::KEY_GET, &[&user.0, &key]).await?;
    let get = |row: Row| Ok((row.try_get::<_, Vec<u8>>(0)?, OrderId(row.try_get(1)?)));
    match row.map(get).transpose().map_err(StoreError::Shape)? {
        Some((hash, order)) if hash == request_hash => Ok(Bound::To(order)),
        _ => Ok(Bound::Misused),
    }
}

/// Turns the user's cart into an order, provided the cart holds exactly `wants` at `agreed`.
pub async fn place(
    db: &Db,
    order: OrderRef,
    wants: &[Want],
    agreed: Cents,
    details: &Value,
) -> Result<Placed, StoreError> {
    let (user, id) = (order.user, order.order);
    let mut tx = db.begin().await?;
    let total = match tx.query(sql::ORDER_INSERT, &[&user.0, &id.0]).await {
        Ok(rows) => rows.first().map(|row| row.try_get(0).map(Cents)).transpose().map_err(StoreError::Shape)?,
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::UNIQUE_VIOLATION) => {
            tx.rollback().await?;
            return Ok(Placed::Before);
        }
        Err(error) => {
            tx.rollback().await.ok();
            return Err(error);
        }
    };
    let rows = tx.query(sql::ORDER_ITEMS_INSERT, &[&user.0, &id.0]).await?;
    let get = |row: &Row| {
        let want = Want { product: ProductId(row.try_get(0)?), qty: row.try_get(1)? };
        Ok((want, row.try_get::<_, i64>(2)?))
    };
    let copied: Vec<(Want, i64)> = rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)?;
    let sum = copied.iter().map(|(want, price)| price.saturating_mul(i64::from(want.qty))).sum::<i64>();
    let as_held = copied.len() == wants.len() && copied.iter().all(|(want, _)| wants.contains(want));
    // The sums are compared because a price may change between two statements of this transaction.
    if !as_held || total != Some(agreed) || sum != agreed.0 {
        tx.rollback().await?;
        return Ok(if total.is_none() && exists(db, order).await? { Placed::Before } else { Placed::CartChanged });
    }
    tx.change(sql::EVENT_INSERT, &[&user.0, &id.0, &1_i32, &"placed", details]).await?;
    outbox::add(&mut tx, user, Topic::OrderPlaced, &json!({ "order_id": id })).await?;
    tx.change(sql::CART_CLEAR, &[&user.0]).await?;
    tx.commit().await?;
    Ok(Placed::Now(agreed))
}

async fn exists(db: &Db, order: OrderRef) -> Result<bool, StoreError> {
    Ok(get(db, order).await?.is_some())
}

/// One order.
pub async fn get(db: &Db, order: OrderRef) -> Result<Option<Order>, StoreError> {
    let row = db.read_opt(sql::ORDER, &[&order.user.0, &order.order.0]).await?;
    let get = |row: Row| {
        Ok(Order {
            id: order.order,
            status: Status::parse(row.try_get(0)?),
            total: Cents(row.try_get(1)?),
            created_at: row.try_get(2)?,
        })
    };
    row.map(get).transpose().map_err(StoreError::Shape)
}

/// A user's latest 50 orders, newest first.
pub async fn history(db: &Db, user: UserId) -> Result<Vec<Order>, StoreError> {
    let get = |row: &Row| {
        Ok(Order {
            id: OrderId(row.try_get(0)?),
            status: Status::parse(row.try_get(1)?),
            total: Cents(row.try_get(2)?),
            created_at: row.try_get(3)?,
        })
    };
    let rows = db.read(sql::ORDERS, &[&user.0]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// The lines of an order.
pub async fn items(db: &Db, order: OrderRef) -> Result<Vec<Item>, StoreError> {
    let get = |row: &Row| {
        Ok(Item {
            product_id: ProductId(row.try_get(0)?),
            name: row.try_get(1)?,
            qty: row.try_get(2)?,
            price_cents: Cents(row.try_get(3)?),
        })
    };
    let rows = db.read(sql::ORDER_ITEMS, &[&order.user.0, &order.order.0]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// What happened to an order, oldest first.
pub async fn events(db: &Db, order: OrderRef) -> Result<Vec<Event>, StoreError> {
    let get = |row: &Row| Ok(Event { kind: row.try_get(0)?, data: row.try_get(1)?, at: row.try_get(2)? });
    let rows = db.read(sql::ORDER_EVENTS, &[&order.user.0, &order.order.0]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// The payment sessions of an order.
pub async fn payments(db: &Db, order: OrderRef) -> Result<Vec<Payment>, StoreError> {
    let get = |row: &Row| Ok(Payment { provider_ref: row.try_get(0)?, state: row.try_get(2)? });
    let rows = db.read(sql::PAYMENTS, &[&order.user.0, &order.order.0]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// Notes that a payment session was opened.
pub async fn note_payment(db: &Db, order: OrderRef, provider_ref: &str, amount: Cents) -> Result<(), StoreError> {
    let (user, id) = (order.user.0, order.order.0);
    db.change(sql::PAYMENT_INSERT, &[&user, &id, &provider_ref, &amount.0, &"open"]).await.map(drop)
}

/// An order locked inside a transaction.
pub struct Locked<'a> {
    tx: Tx<'a>,
    order: OrderRef,
    /// Where the order stands, and will stand at the commit.
    pub status: Status,
    /// What it costs.
    pub total: Cents,
}

/// Locks an order. None: there is no such order.
pub async fn lock(db: &Db, order: OrderRef) -> Result<Option<Locked<'_>>, StoreError> {
    let mut tx = db.begin().await?;
    let rows = tx.query(sql::ORDER_LOCK, &[&order.user.0, &order.order.0]).await?;
    let get = |row: &Row| Ok((Status::parse(row.try_get(0)?), Cents(row.try_get(1)?)));
    match rows.first().map(get).transpose().map_err(StoreError::Shape)? {
        Some((status, total)) => Ok(Some(Locked { tx, order, status, total })),
        None => {
            tx.rollback().await?;
            Ok(None)
        }
    }
}

impl Locked<'_> {
    /// Moves the order on. False: the state machine does not allow it, and nothing was written.
    pub async fn become_status(&mut self, next: Status) -> Result<bool, StoreError> {
        if !self.status.may_become(next) {
            return Ok(false);
        }
        let (user, id) = (self.order.user.0, self.order.order.0);
        let rows = self.tx.query(sql::ORDER_MOVE, &[&user, &id, &self.status.as_str(), &next.as_str()]).await?;
        if !rows.is_empty() {
            self.status = next;
        }
        Ok(!rows.is_empty())
    }

    /// Adds an event after the last.
    pub async fn event(&mut self, kind: &str, data: &Value) -> Result<(), StoreError> {
        let (user, id) = (self.order.user.0, self.order.order.0);
        let rows = self.tx.query(sql::EVENT_LAST, &[&user, &id]).await?;
        let last = rows.first().map(|row| row.try_get::<_, Option<i32>>(0)).transpose().map_err(StoreError::Shape)?;
        let version = last.flatten().unwrap_or(0) + 1;
        self.tx.change(sql::EVENT_INSERT, &[&user, &id, &version, &kind, data]).await.map(drop)
    }

    /// What is known of a payment session: `open`, `paid`, `refund_due` or `refunded`.
    pub async fn payment_state(&mut self, provider_ref: &str) -> Result<Option<String>, StoreError> {
        let rows = self.tx.query(sql::PAYMENTS, &[&self.order.user.0, &self.order.order.0]).await?;
        let known = rows.iter().find(|row| row.try_get::<_, &str>(0).is_ok_and(|known| known == provider_ref));
        known.map(|row| row.try_get(2)).transpose().map_err(StoreError::Shape)
    }

    /// Notes what became of a payment. False: that was known.
    pub async fn payment(&mut self, provider_ref: &str, amount: Cents, state: &str) -> Result<bool, StoreError> {
        let (user, id) = (self.order.user.0, self.order.order.0);
        let added = self.tx.change(sql::PAYMENT_INSERT, &[&user, &id, &provider_ref, &amount.0, &state]).await?;
        Ok(added == 1 || self.tx.change(sql::PAYMENT_SET, &[&user, &id, &provider_ref, &state]).await? == 1)
    }

    /// Remembers a webhook. False: it is a replay.
    pub async fn webhook(&mut self, event_id: &str) -> Result<bool, StoreError> {
        Ok(self.tx.change(sql::WEBHOOK_CLAIM, &[&self.order.user.0, &event_id]).await? == 1)
    }

    /// Adds work to follow this transaction.
    pub async fn outbox(&mut self, topic: Topic, payload: &Value) -> Result<(), StoreError> {
        outbox::add(&mut self.tx, self.order.user, topic, payload).await
    }

    /// Ends an outbox event of the same user in this transaction. False: it was ended before.
    pub async fn outbox_done(&mut self, key: outbox::EventKey) -> Result<bool, StoreError> {
        outbox::done(&mut self.tx, key).await
    }

    /// Commits.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.tx.commit().await
    }

    /// Undoes everything since the lock.
    pub async fn rollback(self) -> Result<(), StoreError> {
        self.tx.rollback().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_moves_only_forward() {
        for (from, to) in Status::ALL.into_iter().flat_map(|from| Status::ALL.map(|to| (from, to))) {
            let allowed = matches!(
                (from.as_str(), to.as_str()),
                ("pending", "paid" | "expired" | "refunded") | ("expired", "paid" | "refunded")
            );
            assert_eq!(from.may_become(to), allowed, "{from} → {to}");
            assert_eq!(Status::parse(from.as_str()), from);
        }
    }
}
