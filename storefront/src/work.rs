//! Background work: the outbox and the sweeper of expired reservations.
//!
//! Invariant: any number of instances may run these at once; every step is safe to repeat. A round that fails is logged and
//! tried again at the next tick. Non-goal: exactness of timing.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use serde_json::json;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::checkout;
use crate::id::{OrderId, OrderRef};
use crate::pay::{PayError, PaymentProvider};
use crate::store::orders::{self, Status};
use crate::store::outbox::{self, Leased, Topic};
use crate::store::stock::{self, HoldState};
use crate::store::{Db, StoreError};

const ATTEMPTS_MAX: i32 = 20;

/// The background work of one instance.
#[derive(Clone)]
pub struct Work {
    /// The database.
    pub db: Db,
    /// Who gives money back.
    pub provider: Arc<dyn PaymentProvider>,
    /// Rung when a transaction has put something into the outbox.
    pub bell: Arc<Notify>,
    /// How often to look without being rung for; the sweeper looks a fifth as often.
    pub every: Duration,
}

#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Pay(#[from] PayError),
    #[error("the event's payload is not of its topic")]
    Payload,
}

impl Work {
    /// Runs until `stop` says true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut round = 0_u32;
        // Instances started together should not look together.
        let jitter = self.every.mul_f64(rand::rng().random_range(0.0..0.25));
        loop {
            // Both are cancel-safe: a missed bell costs one interval, a watch keeps its value.
            tokio::select! {
                () = tokio::time::sleep(self.every + jitter) => {}
                () = self.bell.notified() => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            if let Err(error) = self.empty_outbox().await {
                tracing::warn!(%error, "the outbox waits for the next round");
            }
            if round.is_multiple_of(5)
                && let Err(error) = self.release_expired().await
            {
                tracing::warn!(%error, "expired reservations wait for the next round");
            }
            round = round.wrapping_add(1);
        }
    }

    async fn empty_outbox(&self) -> Result<(), WorkError> {
        for key in outbox::waiting(&self.db).await? {
            let Some(event) = outbox::lease(&self.db, key).await? else {
                continue;
            };
            if let Err(error) = self.handle(&event).await {
                tracing::warn!(%error, topic = ?event.topic, attempts = event.attempts, "an outbox event failed");
                if event.attempts >= ATTEMPTS_MAX {
                    tracing::error!(user = %key.user, event = %key.event, "an outbox event is parked");
                    outbox::park(&self.db, key).await?;
                }
            }
        }
        Ok(())
    }

    async fn handle(&self, event: &Leased) -> Result<(), WorkError> {
        let id = event.payload["order_id"].as_str().and_then(|id| Uuid::parse_str(id).ok());
        let order = OrderRef { user: event.key.user, order: OrderId(id.ok_or(WorkError::Payload)?) };
        match event.topic {
            // Where a shop with a mail server would write to the customer; the event in the history stands for the letter
            // and is written exactly once, in the transaction that ends the outbox event.
            Some(Topic::OrderPlaced) => self.finish(event, order, "confirmation_sent").await,
            Some(Topic::OrderPaid) => self.finish(event, order, "receipt_sent").await,
            Some(Topic::PaymentRefund) => self.give_back(event, order).await,
            None => Err(WorkError::Payload),
        }
    }

    async fn finish(&self, event: &Leased, order: OrderRef, kind: &str) -> Result<(), WorkError> {
        let Some(mut locked) = orders::lock(&self.db, order).await? else {
            return Err(WorkError::Payload);
        };
        if !locked.outbox_done(event.key).await? {
            return Ok(locked.rollback().await?);
        }
        locked.event(kind, &json!({})).await?;
        Ok(locked.commit().await?)
    }

    /// Returns the stock of a refunded order, then the money, then notes both.
    async fn give_back(&self, event: &Leased, order: OrderRef) -> Result<(), WorkError> {
        let reference = event.payload["payment"].as_str().ok_or(WorkError::Payload)?;
        let amount = crate::money::Cents(event.payload["amount_cents"].as_i64().ok_or(WorkError::Payload)?);
        // A second payment of a paid order goes back alone.
        let status = orders::get(&self.db, order).await?.map(|order| order.status);
        if status == Some(Status::Refunded) {
            for item in orders::items(&self.db, order).await? {
                for state in [HoldState::Sold, HoldState::Held] {
                    stock::release(&self.db, item.product_id, order.order, state).await?;
                }
            }
        }
        self.provider.refund(reference).await?;
        let Some(mut locked) = orders::lock(&self.db, order).await? else {
            return Err(WorkError::Payload);
        };
        if !locked.outbox_done(event.key).await? {
            return Ok(locked.rollback().await?);
        }
        locked.payment(reference, amount, "refunded").await?;
        locked.event("money_returned", &json!({ "payment": reference, "amount_cents": amount })).await?;
        Ok(locked.commit().await?)
    }

    async fn release_expired(&self) -> Result<(), WorkError> {
        for hold in stock::expired(&self.db).await? {
            checkout::expire(&self.db, hold.user, hold.order).await?;
            if stock::release(&self.db, hold.product, hold.order, HoldState::Held).await? {
                tracing::info!(product = %hold.product, order = %hold.order, "an expired reservation was released");
            }
        }
        Ok(())
    }
}
