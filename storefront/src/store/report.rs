//! The two reports: reads over all orders.

use serde::Serialize;
use time::OffsetDateTime;
use tokio_postgres::Row;

use super::numeric::Numeric;
use super::{Db, StoreError, sql};
use crate::id::ProductId;
use crate::money::Cents;

/// One day's orders.
#[derive(Clone, Debug, Serialize)]
pub struct Day {
    /// Midnight that the day began with, in the database's time zone.
    #[serde(with = "time::serde::rfc3339")]
    pub day: OffsetDateTime,
    /// Orders placed.
    pub orders: i64,
    /// What they sum up to.
    pub revenue_cents: Cents,
    /// Their mean, to the cent.
    pub average_cents: Cents,
    /// Different customers.
    pub customers: i64,
}

/// How often a product was sold.
#[derive(Clone, Debug, Serialize)]
pub struct Seller {
    /// The product.
    pub product_id: ProductId,
    /// Its name today.
    pub name: String,
    /// Units in orders.
    pub sold: i64,
}

/// Orders per day since a time, oldest day first.
pub async fn days(db: &Db, since: OffsetDateTime) -> Result<Vec<Day>, StoreError> {
    let get = |row: &Row| {
        Ok(Day {
            day: row.try_get(0)?,
            orders: row.try_get(1)?,
            revenue_cents: Cents(row.try_get::<_, Numeric>(2)?.rounded()),
            average_cents: Cents(row.try_get::<_, Numeric>(3)?.rounded()),
            customers: row.try_get(4)?,
        })
    };
    let rows = db.read(sql::REPORT_DAYS, &[&since]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}

/// The ten products most sold since a time.
pub async fn best_sellers(db: &Db, since: OffsetDateTime) -> Result<Vec<Seller>, StoreError> {
    let get =
        |row: &Row| Ok(Seller { product_id: ProductId(row.try_get(0)?), name: row.try_get(1)?, sold: row.try_get(2)? });
    let rows = db.read(sql::REPORT_BEST_SELLERS, &[&since]).await?;
    rows.iter().map(get).collect::<Result<_, _>>().map_err(StoreError::Shape)
}
