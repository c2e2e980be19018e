//! Stock: rows of one product per transaction.
//!
//! Invariant: `available` plus the units of all holds and sales of a product is constant. Every function is safe to repeat:
//! the row (product, order) in `stock_holds` tells what has been done.

use std::time::Duration;

use time::OffsetDateTime;
use tokio_postgres::Row;

use super::{Db, StoreError, sql};
use crate::id::{OrderId, ProductId, UserId};

/// How a reservation or sale ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The units are the order's.
    Yes,
    /// There are not that many left.
    SoldOut,
    /// The order holds another quantity of this product.
    OtherQuantity,
}

/// State of a row in `stock_holds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// Reserved until it expires.
    Held,
    /// Paid for.
    Sold,
}

impl HoldState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Sold => "sold",
        }
    }
}

/// Units of one product that an order wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The product.
    pub product: ProductId,
    /// How many.
    pub qty: i32,
}

/// A reservation whose time is up.
#[derive(Clone, Copy, Debug)]
pub struct Expired {
    /// The product.
    pub product: ProductId,
    /// The order that reserved it.
    pub order: OrderId,
    /// Whose order that is.
    pub user: UserId,
}

/// Reserves units for an order.
pub async fn hold(db: &Db, user: UserId, order: OrderId, want: Want, lasts: Duration) -> Result<Taken, StoreError> {
    let expires = OffsetDateTime::now_utc() + lasts;
    let mut tx = db.begin().await?;
    if tx.change(sql::HOLD, &[&want.product.0, &order.0, &user.0, &want.qty, &expires]).await? == 0 {
        let rows = tx.query(sql::HOLD_GET, &[&want.product.0, &order.0]).await?;
        tx.rollback().await?;
        return match rows.first().map(quantity).transpose()? {
            Some(qty) if qty == want.qty => Ok(Taken::Yes),
            _ => Ok(Taken::OtherQuantity),
        };
    }
    if tx.query(sql::STOCK_TAKE, &[&want.product.0, &want.qty]).await?.is_empty() {
        tx.rollback().await?;
        return Ok(Taken::SoldOut);
    }
    tx.commit().await?;
    Ok(Taken::Yes)
}

/// Makes a paid order's units sold: its hold if that still stands, else from what is left.
pub async fn sell(db: &Db, user: UserId, order: OrderId, want: Want) -> Result<Taken, StoreError> {
    let mut tx = db.begin().await?;
    if !tx.query(sql::HOLD_SELL, &[&want.product.0, &order.0]).await?.is_empty() {
        tx.commit().await?;
        return Ok(Taken::Yes);
    }
    let now = OffsetDateTime::now_utc();
    if tx.change(sql::HOLD_SELL_LATE, &[&want.product.0, &order.0, &user.0, &want.qty, &now]).await? == 0 {
        // Sold before: this is a repetition.
        tx.rollback().await?;
        return Ok(Taken::Yes);
    }
    if tx.query(sql::STOCK_TAKE, &[&want.product.0, &want.qty]).await?.is_empty() {
        tx.rollback().await?;
        return Ok(Taken::SoldOut);
    }
    tx.commit().await?;
    Ok(Taken::Yes)
}

/// Returns an order's units of a product to stock, if they are in the given state.
pub async fn release(db: &Db, product: ProductId, order: OrderId, state: HoldState) -> Result<bool, StoreError> {
    let mut tx = db.begin().await?;
    let rows = tx.query(sql::HOLD_RELEASE, &[&product.0, &order.0, &state.as_str()]).await?;
    let Some(qty) = rows.first().map(quantity).transpose()? else {
        tx.rollback().await?;
        return Ok(false);
    };
    tx.change(sql::STOCK_RETURN, &[&product.0, &qty]).await?;
    tx.commit().await?;
    Ok(true)
}

/// Up to 100 reservations whose time is up, oldest first.
pub async fn expired(db: &Db) -> Result<Vec<Expired>, StoreError> {
    let get = |row: &Row| {
        Ok(Expired {
            product: ProductId(row.try_get(0)?),
            order: OrderId(row.try_get(1)?),
            user: UserId(row.try_get(2)?),
        })
    };
    let rows = db.read(sql::EXPIRED_HOLDS, &[]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

fn quantity(row: &Row) -> Result<i32, StoreError> {
    row.try_get(0).map_err(StoreError::Shape)
}
