//! Loads a catalogue: from a CSV file, or the generated one.
//!
//! Invariant: loading the same rows again changes nothing: products are known by their article number, and a product that
//! exists keeps its id, price and stock. Rows stream through in batches, so memory does not grow with the file.
//! Non-goal: updates and deletions.

pub mod generated;

use std::collections::{HashMap, HashSet};
use std::io::Read;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use crate::keys::sha256;
use crate::money::Cents;
use crate::store::{Db, sql};

/// Products per INSERT.
const BATCH: usize = 500;
/// Stock INSERTs under way at once on the one connection.
const IN_FLIGHT_MAX: usize = 256;

/// One product as a catalogue describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// `Category`, or `Category > Section`.
    pub category: String,
    /// Article number.
    pub sku: String,
    /// Name.
    pub name: String,
    /// Brand, or empty.
    pub brand: String,
    /// Price in cents.
    pub price_cents: i64,
    /// First stock.
    pub stock: i32,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Rows read.
    pub rows: usize,
    /// Products that are in the shop now.
    pub products: usize,
    /// Rows without effect because another article has taken their id.
    pub skipped: usize,
}

/// Reads a CSV with a header line. The price may be in `price_cents` or, as a price tag, in `price`.
pub fn read_csv(input: impl Read) -> impl Iterator<Item = anyhow::Result<Row>> {
    #[derive(Deserialize)]
    struct Line {
        category: String,
        sku: String,
        name: String,
        #[serde(default)]
        brand: String,
        price_cents: Option<i64>,
        price: Option<String>,
        stock: i32,
    }
    let lines = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input).into_deserialize();
    lines.enumerate().map(|(index, line)| {
        let line: Line = line.with_context(|| format!("row {} of the catalogue", index + 1))?;
        let tag = line.price.as_deref().and_then(Cents::parse).map(|cents| cents.0);
        let price_cents = line.price_cents.or(tag).filter(|cents| *cents >= 0);
        let price_cents = price_cents.with_context(|| format!("row {} of the catalogue has no price", index + 1))?;
        anyhow::ensure!(line.stock >= 0, "row {} of the catalogue has a negative stock", index + 1);
        let Line { category, sku, name, brand, stock, .. } = line;
        Ok(Row { category, sku, name, brand, price_cents, stock })
    })
}

/// Loads rows; the n-th gets the id `first_id + n` if its article is new.
pub async fn load(db: &Db, rows: impl Iterator<Item = anyhow::Result<Row>>, first_id: i64) -> anyhow::Result<Loaded> {
    let client = db.dedicated().await.context("cannot connect to load the catalogue")?;
    let mut loader = Loader { client, categories: HashSet::new(), inserts: HashMap::new() };
    let mut loaded = Loaded::default();
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        let batch: Vec<Row> = rows.by_ref().take(BATCH).collect::<Result<_, _>>()?;
        let first = first_id + loaded.rows as i64;
        loader.categories(&batch).await?;
        let products = loader.products(&batch, first).await?;
        loaded.rows += batch.len();
        loaded.products += products;
        loaded.skipped += batch.len() - products;
    }
    Ok(loaded)
}

struct Loader {
    client: Client,
    categories: HashSet<i32>,
    /// Multi-row INSERTs by their text: one per table and number of rows.
    inserts: HashMap<String, Statement>,
}

/// The names from the outermost in, with the path of each as its slug.
fn path(category: &str) -> Vec<(String, String)> {
    let mut slug = String::new();
    let names = category.split('>').map(str::trim).filter(|name| !name.is_empty()).take(2);
    names
        .map(|name| {
            if !slug.is_empty() {
                slug.push_str("--");
            }
            slug.push_str(&slugged(name));
            (slug.clone(), name.to_owned())
        })
        .collect()
}

fn slugged(name: &str) -> String {
    let mapped: String = name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let words: Vec<&str> = mapped.split('-').filter(|word| !word.is_empty()).collect();
    if words.is_empty() { "other".to_owned() } else { words.join("-") }
}

/// A category's id is a function of its slug, so that every load and every instance agrees on it.
fn category_id(slug: &str) -> i32 {
    let hash = sha256(&[b"category", slug.as_bytes()]);
    (i32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) & i32::MAX).max(1)
}

fn values(rows: usize, columns: usize) -> String {
    let row = |row: usize| {
        let columns: Vec<String> = (1..=columns).map(|column| format!("${}", row * columns + column)).collect();
        format!("({})", columns.join(","))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(",")
}

impl Loader {
    async fn insert(&mut self, head: &str, columns: usize, params: &[&(dyn ToSql + Sync)]) -> anyhow::Result<()> {
        let text = format!("{head} VALUES {} ON CONFLICT DO NOTHING", values(params.len() / columns, columns));
        let statement = match self.inserts.get(&text) {
            Some(statement) => statement.clone(),
            None => {
                let statement = self.client.prepare(&text).await.with_context(|| format!("cannot prepare {head}"))?;
                self.inserts.insert(text, statement.clone());
                statement
            }
        };
        self.client.execute(&statement, params).await.with_context(|| format!("cannot run {head}"))?;
        Ok(())
    }

    async fn categories(&mut self, batch: &[Row]) -> anyhow::Result<()> {
        let mut fresh: Vec<(i32, Option<i32>, String, String)> = Vec::new();
        for row in batch {
            let mut parent = None;
            for (slug, name) in path(&row.category) {
                let id = category_id(&slug);
                if self.categories.insert(id) {
                    fresh.push((id, parent, slug, name));
                }
                parent = Some(id);
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let params: Vec<&(dyn ToSql + Sync)> =
            fresh.iter().flat_map(|(id, parent, slug, name)| [id as &(dyn ToSql + Sync), parent, slug, name]).collect();
        self.insert("INSERT INTO categories(category_id,parent_id,slug,name)", 4, &params).await
    }

    /// Inserts products and their stock; returns how many of the batch are in the shop.
    async fn products(&mut self, batch: &[Row], first: i64) -> anyhow::Result<usize> {
        let category = |row: &Row| path(&row.category).last().map_or(0, |(slug, _)| category_id(slug));
        let keyed: Vec<(i64, i32)> = batch.iter().zip(first..).map(|(row, id)| (id, category(row))).collect();
        let params: Vec<&(dyn ToSql + Sync)> = batch
            .iter()
            .zip(&keyed)
            .flat_map(|(row, (id, category))| {
                [id as &(dyn ToSql + Sync), category, &row.sku, &row.name, &row.brand, &row.price_cents]
            })
            .collect();
        self.insert("INSERT INTO products(product_id,category_id,sku,name,brand,price_cents)", 6, &params).await?;
        let skus: Vec<&str> = batch.iter().map(|row| row.sku.as_str()).collect();
        let known = self.client.query(sql::PRODUCT_IDS_BY_SKU, &[&skus]).await.context("cannot read products back")?;
        let ids: HashMap<&str, i64> = known.iter().map(|row| (row.get(0), row.get(1))).collect();
        let statement = self.client.prepare(sql::STOCK_INSERT).await.context("cannot prepare stock")?;
        // Sent without waiting for each other: tokio-postgres pipelines what is under way on one connection.
        let (client, statement) = (&self.client, &statement);
        let stocked = batch.iter().filter_map(|row| ids.get(row.sku.as_str()).map(|id| (*id, row.stock)));
        let inserted: usize = stream::iter(stocked)
            .map(|(id, stock)| async move { client.execute(statement, &[&id, &stock]).await.map(|_| 1) })
            .buffer_unordered(IN_FLIGHT_MAX)
            .try_fold(0, |sum, one| async move { Ok(sum + one) })
            .await
            .context("cannot insert stock")?;
        Ok(inserted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_from_csv_with_either_price() {
        let text = "category,sku,name,brand,price_cents,stock\nTea > Green,a-1,\"Sencha, 100 g\",Acme,1250,7\n";
        let rows: Vec<Row> = read_csv(text.as_bytes()).collect::<Result<_, _>>().expect("rows");
        assert_eq!((rows[0].name.as_str(), rows[0].price_cents, rows[0].stock), ("Sencha, 100 g", 1250, 7));
        let text = "category,sku,name,price,stock\nTea,a-1,Sencha,$12.50,7\n";
        assert_eq!(read_csv(text.as_bytes()).next().expect("a row").expect("good").price_cents, 1250);
        for bad in ["Tea,a-1,Sencha,free,7", "Tea,a-1,Sencha,1.00,-1", "Tea,a-1,Sencha,1.00"] {
            let text = format!("category,sku,name,price,stock\n{bad}\n");
            assert!(read_csv(text.as_bytes()).next().expect("a row").is_err(), "{bad}");
        }
    }

    #[test]
    fn categories_have_stable_ids_and_nested_slugs() {
        let names = path("Drinks > Tea & Herbs");
        assert_eq!(names[0], ("drinks".into(), "Drinks".into()));
        assert_eq!(names[1], ("drinks--tea-herbs".into(), "Tea & Herbs".into()));
        assert_eq!(category_id("drinks"), category_id("drinks"));
        assert!(category_id("drinks") > 0);
        assert_eq!(slugged("Ω"), "other");
    }

    #[test]
    fn placeholders_count_through_all_rows() {
        assert_eq!(values(2, 3), "($1,$2,$3),($4,$5,$6)");
    }
}
