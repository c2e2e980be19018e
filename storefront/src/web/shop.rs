//! The shop window: front page, categories, search, product pages. Reads only.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::json;

use super::Shared;
use super::negotiate::Wants;
use super::pages::{self, Aisles, Frame, Shelf};
use super::problem::Problem;
use super::session::MaybeVisitor;
use crate::id::ProductId;
use crate::store::catalog;

/// The front page.
pub async fn home(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
) -> Result<Response, Problem> {
    let featured = catalog::featured(&shop.db).await?;
    if wants == Wants::Json {
        let categories = catalog::categories(&shop.db).await?;
        return Ok(Json(json!({ "categories": categories, "featured": featured })).into_response());
    }
    let frame = Frame::load(&shop, visitor.as_ref(), "Millrace").await?;
    let shelf = Shelf::stocked(&shop, featured, &frame.aisles).await?;
    pages::home(frame, shelf)
}

/// Where a page of a category begins.
#[derive(Deserialize)]
pub struct After {
    after: Option<i64>,
}

/// One page of a category with its sub-categories.
pub async fn category(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Path(slug): Path<String>,
    Query(after): Query<After>,
) -> Result<Response, Problem> {
    let aisles = Aisles::of(catalog::categories(&shop.db).await?);
    let category = aisles.by_slug(&slug).cloned().ok_or_else(|| Problem::not_found("category"))?;
    let after = ProductId(after.after.unwrap_or(0));
    let page = catalog::page(&shop.db, &aisles.family(category.id), after).await?;
    if wants == Wants::Json {
        let body = json!({ "category": category, "products": page.products, "next_after": page.next_after });
        return Ok(Json(body).into_response());
    }
    let frame = Frame::with(&shop, visitor.as_ref(), &category.name, aisles).await?;
    let shelf = Shelf::stocked(&shop, page.products, &frame.aisles).await?;
    pages::category(frame, category, shelf, after.0 > 0, page.next_after)
}

/// What to look for.
#[derive(Deserialize)]
pub struct Words {
    q: Option<String>,
}

/// Full text search.
pub async fn search(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Query(words): Query<Words>,
) -> Result<Response, Problem> {
    let words: String = words.q.unwrap_or_default().trim().chars().filter(|c| !c.is_control()).take(200).collect();
    let found = if words.is_empty() { Vec::new() } else { catalog::search(&shop.db, &words).await? };
    if wants == Wants::Json {
        return Ok(Json(json!({ "query": words, "products": found })).into_response());
    }
    let mut frame = Frame::load(&shop, visitor.as_ref(), "Search").await?;
    frame.query.clone_from(&words);
    let shelf = Shelf::stocked(&shop, found, &frame.aisles).await?;
    pages::search(frame, words, shelf)
}

/// One product with its stock.
pub async fn product(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let id = id.parse().map(ProductId).map_err(|_| Problem::not_found("product"))?;
    let ids = [id];
    let (product, stock) = tokio::try_join!(catalog::product(&shop.db, id), catalog::stock(&shop.db, &ids))?;
    let product = product.ok_or_else(|| Problem::not_found("product"))?;
    let available = if product.active { stock.first().copied().unwrap_or(0) } else { 0 };
    if wants == Wants::Json {
        return Ok(Json(json!({ "product": product, "available": available })).into_response());
    }
    let frame = Frame::load(&shop, visitor.as_ref(), &product.name).await?;
    let mut near = catalog::page(&shop.db, &[product.category_id], ProductId(0)).await?.products;
    near.retain(|other| other.id != product.id);
    near.truncate(4);
    let near = Shelf::stocked(&shop, near, &frame.aisles).await?;
    pages::product(frame, product, available, near)
}
