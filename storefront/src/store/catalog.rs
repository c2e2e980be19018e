//! Reads of the catalogue: categories, products, search, stock figures.
//!
//! Invariant: nothing here writes.

use serde::Serialize;
use tokio_postgres::Row;

use super::{Db, StoreError, sql};
use crate::id::{CategoryId, ProductId};
use crate::money::Cents;

/// A category, or a sub-category if it has a parent.
#[derive(Clone, Debug, Serialize)]
pub struct Category {
    /// Its id, derived from the slug.
    pub id: CategoryId,
    /// The category it belongs to.
    pub parent: Option<CategoryId>,
    /// Its name in addresses.
    pub slug: String,
    /// Its name for people.
    pub name: String,
}

/// A product as lists show it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: ProductId,
    /// The category it is in.
    pub category: CategoryId,
    /// Its name.
    pub name: String,
    /// Its brand, empty where unknown.
    pub brand: String,
    /// Its price in cents.
    pub price_cents: Cents,
}

/// A product with all that its page shows, except stock.
#[derive(Clone, Debug, Serialize)]
pub struct Product {
    /// Its id.
    pub id: ProductId,
    /// The category it is in.
    pub category_id: CategoryId,
    /// The seller's article number.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// Its brand, empty where unknown.
    pub brand: String,
    /// Its price in cents.
    pub price_cents: Cents,
    /// Whether it is for sale.
    pub active: bool,
    /// Its category's name.
    pub category: String,
    /// Its category's name in addresses.
    pub category_slug: String,
}

/// Products on one page of a category.
pub const PAGE: usize = 24;

/// One page of a category.
#[derive(Debug, Serialize)]
pub struct Page {
    /// At most `PAGE` products.
    pub products: Vec<Listed>,
    /// Ask for products after this one to get the next page; none: this is the last.
    pub next_after: Option<ProductId>,
}

fn listed(row: &Row) -> Result<Listed, StoreError> {
    let get = || {
        Ok(Listed {
            id: ProductId(row.try_get(0)?),
            category: CategoryId(row.try_get(1)?),
            name: row.try_get(2)?,
            brand: row.try_get::<_, Option<String>>(3)?.unwrap_or_default(),
            price_cents: Cents(row.try_get(4)?),
        })
    };
    get().map_err(StoreError::Shape)
}

/// Every category, by name.
pub async fn categories(db: &Db) -> Result<Vec<Category>, StoreError> {
    let rows = db.read(sql::CATEGORIES, &[]).await?;
    let get = |row: &Row| {
        Ok(Category {
            id: CategoryId(row.try_get(0)?),
            parent: row.try_get::<_, Option<i32>>(1)?.map(CategoryId),
            slug: row.try_get(2)?,
            name: row.try_get(3)?,
        })
    };
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// The page of products after `after` in any of `categories`.
pub async fn page(db: &Db, categories: &[CategoryId], after: ProductId) -> Result<Page, StoreError> {
    let ids: Vec<i32> = categories.iter().map(|id| id.0).collect();
    let rows = db.read(sql::PRODUCTS_IN_CATEGORY, &[&ids, &after.0]).await?;
    let mut products: Vec<Listed> = rows.iter().map(listed).collect::<Result<_, _>>()?;
    let more = products.len() > PAGE;
    products.truncate(PAGE);
    let next_after = products.last().filter(|_| more).map(|product| product.id);
    Ok(Page { products, next_after })
}

/// The products the shop opens with.
pub async fn featured(db: &Db) -> Result<Vec<Listed>, StoreError> {
    db.read(sql::PRODUCTS_FEATURED, &[]).await?.iter().map(listed).collect()
}

/// The best matches of a search.
pub async fn search(db: &Db, words: &str) -> Result<Vec<Listed>, StoreError> {
    db.read(sql::PRODUCTS_MATCHING, &[&words]).await?.iter().map(listed).collect()
}

/// One product.
pub async fn product(db: &Db, id: ProductId) -> Result<Option<Product>, StoreError> {
    let row = db.read_opt(sql::PRODUCT, &[&id.0]).await?;
    let get = |row: Row| {
        Ok(Product {
            id: ProductId(row.try_get(0)?),
            category_id: CategoryId(row.try_get(1)?),
            sku: row.try_get(2)?,
            name: row.try_get(3)?,
            brand: row.try_get::<_, Option<String>>(4)?.unwrap_or_default(),
            price_cents: Cents(row.try_get(5)?),
            active: row.try_get(6)?,
            category: row.try_get(7)?,
            category_slug: row.try_get(8)?,
        })
    };
    row.map(get).transpose().map_err(StoreError::Shape)
}

/// Units available, in the order of `products`; a product without stock data has none.
pub async fn stock(db: &Db, products: &[ProductId]) -> Result<Vec<i32>, StoreError> {
    if products.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<i64> = products.iter().map(|id| id.0).collect();
    let rows = db.read(sql::STOCK, &[&ids]).await?;
    let found = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<std::collections::HashMap<i64, i32>, _>>()
        .map_err(StoreError::Shape)?;
    Ok(ids.iter().map(|id| found.get(id).copied().unwrap_or(0)).collect())
}
