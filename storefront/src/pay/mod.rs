//! Payment: what the shop asks of a provider, and the messages it gets back.
//!
//! Invariant: a card number never passes through the shop; the customer enters it on the provider's page. Money counts as
//! received only on the word of the provider: a signed webhook, or its answer to the shop's own question.
//! Shapes follow Stripe's Checkout (sessions, `checkout.session.completed`, signature header), so that a real provider of
//! that kind is one implementation of `PaymentProvider` away.

pub mod http;
pub mod sandbox;
pub mod webhook;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::money::Cents;

/// A payment page to be opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewSession {
    /// The order's public reference. Also the idempotency key: one order, one session.
    pub client_reference_id: String,
    /// What to charge, in cents.
    pub amount_total: Cents,
    /// ISO 4217, lower case.
    pub currency: String,
    /// Where the customer goes after paying.
    pub success_url: String,
    /// Where the customer goes instead.
    pub cancel_url: String,
}

/// Where a payment session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PaymentStatus {
    /// Nothing was charged.
    Unpaid,
    /// The amount was charged.
    Paid,
    /// The amount was charged and given back.
    Refunded,
}

/// A payment session as the provider describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Session {
    /// The provider's id, `cs_…`.
    pub id: String,
    /// The page where the customer pays.
    pub url: String,
    /// The order's public reference.
    pub client_reference_id: String,
    /// The amount in cents.
    pub amount_total: Cents,
    /// ISO 4217, lower case.
    pub currency: String,
    /// Where it stands.
    pub payment_status: PaymentStatus,
}

/// Why the provider did not do it.
#[derive(Debug, thiserror::Error)]
pub enum PayError {
    /// Nobody answers, or not in time.
    #[error("the payment provider does not answer: {0}")]
    Unavailable(String),
    /// It refused.
    #[error("the payment provider refused: {0}")]
    Refused(String),
}

/// A payment provider.
pub trait PaymentProvider: Send + Sync {
    /// Opens a payment page; for an order that has one, that page.
    fn open(&self, new: NewSession) -> BoxFuture<'_, Result<Session, PayError>>;

    /// Asks where a session stands.
    fn get<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Session, PayError>>;

    /// Gives back what a session charged. Repeating it gives back nothing more.
    fn refund<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(), PayError>>;
}
