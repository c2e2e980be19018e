//! The cart: rows of one user.

use serde::Serialize;
use tokio_postgres::Row;

use super::{Db, StoreError, sql};
use crate::id::{CategoryId, ProductId, UserId};
use crate::money::Cents;

/// Most units of one product in a cart.
pub const QUANTITY_MAX: i32 = 99;

/// One line of a cart, at today's price.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The product.
    pub product_id: ProductId,
    /// Its name.
    pub name: String,
    /// Its category.
    pub category: CategoryId,
    /// How many.
    pub qty: i32,
    /// Price of one, in cents.
    pub price_cents: Cents,
}

/// The lines of a cart by name.
pub async fn lines(db: &Db, user: UserId) -> Result<Vec<Line>, StoreError> {
    let get = |row: &Row| {
        Ok(Line {
            product_id: ProductId(row.try_get(0)?),
            name: row.try_get(1)?,
            category: CategoryId(row.try_get(2)?),
            qty: row.try_get(3)?,
            price_cents: Cents(row.try_get(4)?),
        })
    };
    let rows = db.read(sql::CART, &[&user.0]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// What the lines cost together.
pub fn total(lines: &[Line]) -> Cents {
    Cents(lines.iter().map(|line| line.price_cents.0.saturating_mul(i64::from(line.qty))).fold(0, i64::saturating_add))
}

/// Units in a cart.
pub async fn count(db: &Db, user: UserId) -> Result<i64, StoreError> {
    let row = db.read_opt(sql::CART_COUNT, &[&user.0]).await?;
    let count = row.map(|row| row.try_get::<_, Option<i64>>(0)).transpose().map_err(StoreError::Shape)?;
    Ok(count.flatten().unwrap_or(0))
}

/// Adds units of a product that exists.
pub async fn add(db: &Db, user: UserId, product: ProductId, qty: i32) -> Result<(), StoreError> {
    db.change(sql::CART_ADD, &[&user.0, &product.0, &qty]).await.map(drop)
}

/// Sets a line; zero removes it.
pub async fn set(db: &Db, user: UserId, product: ProductId, qty: i32) -> Result<(), StoreError> {
    if qty == 0 {
        db.change(sql::CART_REMOVE, &[&user.0, &product.0]).await.map(drop)
    } else {
        db.change(sql::CART_SET, &[&user.0, &product.0, &qty]).await.map(drop)
    }
}

/// Takes a guest's cart over when the guest logs in to an account. A crash in between repeats lines, it never doubles them.
pub async fn merge(db: &Db, guest: UserId, account: UserId) -> Result<(), StoreError> {
    for line in lines(db, guest).await? {
        db.change(sql::CART_MERGE, &[&account.0, &line.product_id.0, &line.qty]).await?;
        db.change(sql::CART_REMOVE, &[&guest.0, &line.product_id.0]).await?;
    }
    Ok(())
}
