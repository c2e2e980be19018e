//! The storefront: a thin shop that knows one DATABASE_URL.
//!
//! The path of one purchase: `web::cart` → `checkout::place` (idempotency key → stock holds → order) → the payment
//! provider's own page → `web::webhook` → `checkout::settle` (stock sold → order paid) → `work` (outbox, expired holds).
//!
//! Invariant: every statement is in `store::sql`; every transaction touches the rows of one user, one product or one
//! e-mail address and no others. Non-goals: knowing what stands behind the DATABASE_URL, and any browser-side framework.

pub mod app;
pub mod catalogue;
pub mod checkout;
pub mod id;
pub mod keys;
pub mod money;
pub mod pay;
pub mod store;
pub mod web;
pub mod work;
