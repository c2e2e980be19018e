//! The cart's pages.
//!
//! Invariant: looking creates nothing; the first thing put into a cart makes the visitor a guest with a session.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::negotiate::{Body, Wants};
use super::pages::{self, Frame};
use super::problem::Problem;
use super::session::{self, MaybeVisitor};
use super::{Shared, see_other, with_cookie};
use crate::id::{ProductId, UserId};
use crate::money::Cents;
use crate::store::cart::{self, Line, QUANTITY_MAX};
use crate::store::{catalog, users};

#[derive(Serialize)]
struct CartView<'a> {
    lines: &'a [Line],
    total_cents: Cents,
}

async fn lines(shop: &Shared, user: Option<UserId>) -> Result<Vec<Line>, Problem> {
    match user {
        Some(user) => Ok(cart::lines(&shop.db, user).await?),
        None => Ok(Vec::new()),
    }
}

/// The cart.
pub async fn show(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
) -> Result<Response, Problem> {
    let lines = lines(&shop, visitor.as_ref().map(|visitor| visitor.user)).await?;
    if wants == Wants::Json {
        return Ok(Json(CartView { total_cents: cart::total(&lines), lines: &lines }).into_response());
    }
    let products: Vec<ProductId> = lines.iter().map(|line| line.product_id).collect();
    let stock = catalog::stock(&shop.db, &products).await?;
    let frame = Frame::load(&shop, visitor.as_ref(), "Your cart").await?;
    pages::cart(frame, &lines, &stock)
}

/// A product and how many of it.
#[derive(Deserialize)]
pub struct Change {
    #[serde(deserialize_with = "pages::number")]
    product_id: i64,
    #[serde(default = "one", deserialize_with = "pages::number")]
    qty: i64,
}

fn one() -> i64 {
    1
}

impl Change {
    fn quantity(&self, least: i32) -> Result<i32, Problem> {
        let quantity = i32::try_from(self.qty).ok().filter(|qty| (least..=QUANTITY_MAX).contains(qty));
        quantity.ok_or_else(|| Problem::invalid(&format!("The quantity must be between {least} and {QUANTITY_MAX}.")))
    }
}

/// Puts something into the cart.
pub async fn add(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Body(change): Body<Change>,
) -> Result<Response, Problem> {
    let qty = change.quantity(1)?;
    let product = catalog::product(&shop.db, ProductId(change.product_id)).await?;
    let product = product.filter(|product| product.active).ok_or_else(|| Problem::not_found("product"))?;
    let (user, cookie) = match visitor {
        Some(visitor) => (visitor.user, None),
        None => {
            let guest = UserId::random();
            users::create_guest(&shop.db, guest).await?;
            (guest, Some(session::start(&shop, guest).await?))
        }
    };
    cart::add(&shop.db, user, product.id, qty).await?;
    match wants {
        Wants::Html => Ok(see_other("/cart", cookie)),
        Wants::Json => {
            let lines = cart::lines(&shop.db, user).await?;
            let body = Json(CartView { total_cents: cart::total(&lines), lines: &lines }).into_response();
            Ok(with_cookie(body, cookie))
        }
    }
}

/// Sets how many of a product are in the cart; none removes it.
pub async fn update(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Body(change): Body<Change>,
) -> Result<Response, Problem> {
    let qty = change.quantity(0)?;
    let visitor = visitor.ok_or_else(|| Problem::not_found("cart line"))?;
    let product = ProductId(change.product_id);
    let before = cart::lines(&shop.db, visitor.user).await?;
    if !before.iter().any(|line| line.product_id == product) {
        return Err(Problem::not_found("cart line"));
    }
    cart::set(&shop.db, visitor.user, product, qty).await?;
    match wants {
        Wants::Html => Ok(see_other("/cart", None)),
        Wants::Json => {
            let lines = cart::lines(&shop.db, visitor.user).await?;
            Ok(Json(json!({ "lines": lines, "total_cents": cart::total(&lines) })).into_response())
        }
    }
}
