//! The outbox: work that must follow a transaction, written in it.
//!
//! Invariant: an event is handed to one worker at a time (a lease of 30 seconds) and at least once; what a worker does must
//! bear repetition, or be done in the transaction that ends the event.

use serde_json::Value;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Db, StoreError, Tx, sql};
use crate::id::UserId;

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// An order was placed: confirm it.
    OrderPlaced,
    /// An order was paid: send the receipt.
    OrderPaid,
    /// A payment must go back, and stock taken for it too.
    PaymentRefund,
}

impl Topic {
    /// Its name in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OrderPlaced => "order.placed",
            Self::OrderPaid => "order.paid",
            Self::PaymentRefund => "payment.refund",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::OrderPlaced, Self::OrderPaid, Self::PaymentRefund].into_iter().find(|topic| topic.as_str() == text)
    }
}

/// Names one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventKey {
    /// Whose event.
    pub user: UserId,
    /// Which one.
    pub event: Uuid,
}

/// An event this worker has leased.
#[derive(Debug)]
pub struct Leased {
    /// Which event.
    pub key: EventKey,
    /// What to do; none: a newer version of the shop wrote it.
    pub topic: Option<Topic>,
    /// What it is about.
    pub payload: Value,
    /// How often it was tried, this time included.
    pub attempts: i32,
}

/// Adds an event to the transaction.
pub async fn add(tx: &mut Tx<'_>, user: UserId, topic: Topic, payload: &Value) -> Result<(), StoreError> {
    tx.change(sql::OUTBOX_INSERT, &[&user.0, &Uuid::now_v7(), &topic.as_str(), payload]).await.map(drop)
}

/// Up to 50 events that seem to wait.
pub async fn waiting(db: &Db) -> Result<Vec<EventKey>, StoreError> {
    let get = |row: &Row| Ok(EventKey { user: UserId(row.try_get(0)?), event: row.try_get(1)? });
    let rows = db.read(sql::WAITING_EVENTS, &[]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// Takes an event, if nobody else has it.
pub async fn lease(db: &Db, key: EventKey) -> Result<Option<Leased>, StoreError> {
    let rows = db.write(sql::OUTBOX_LEASE, &[&key.user.0, &key.event]).await?;
    let get = |row: &Row| {
        let topic: String = row.try_get(0)?;
        Ok(Leased { key, topic: Topic::parse(&topic), payload: row.try_get(1)?, attempts: row.try_get(2)? })
    };
    rows.first().map(get).transpose().map_err(StoreError::Shape)
}

/// Ends an event inside the transaction that did its work. False: it was ended before, so roll back.
pub async fn done(tx: &mut Tx<'_>, key: EventKey) -> Result<bool, StoreError> {
    Ok(tx.change(sql::OUTBOX_DONE, &[&key.user.0, &key.event]).await? == 1)
}

/// Sets an event aside for good.
pub async fn park(db: &Db, key: EventKey) -> Result<(), StoreError> {
    db.change(sql::OUTBOX_PARK, &[&key.user.0, &key.event]).await.map(drop)
}
