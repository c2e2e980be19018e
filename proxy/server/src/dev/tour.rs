//! Three statements a person can try, and what weir's own ROUTE says of each.
//!
//! Invariant: the explanation shown is weir's answer, never a guess of ours. Non-goal: running the statements.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::stack::Stack;

const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// One statement, and weir's words on it as (item, value); or why there are none.
pub(super) struct Stop {
    pub(super) title: &'static str,
    pub(super) sql: String,
    pub(super) route: Vec<(String, String)>,
}

/// The three stops; none if there is no shop and so no table to ask about.
pub(super) async fn take(stack: &Stack) -> Vec<Stop> {
    if stack.storefront.is_none() {
        return Vec::new();
    }
    let product = tokio::time::timeout(ANSWER_WAIT, any_product(stack)).await;
    let product = product.ok().and_then(Result::ok).unwrap_or(1);
    let statements = [
        ("one write", format!("UPDATE inventory SET available = available + 1 WHERE product_id = {product}")),
        ("one read", format!("SELECT available FROM inventory WHERE product_id = {product}")),
        ("one query across shards", "SELECT count(*), sum(available) FROM inventory".to_owned()),
    ];
    let mut stops = Vec::new();
    for (title, sql) in statements {
        let answer = tokio::time::timeout(ANSWER_WAIT, route(stack, &sql)).await;
        let answer = answer.context("weir does not answer").and_then(|answer| answer);
        let route = answer.unwrap_or_else(|error| vec![("ROUTE failed".to_owned(), format!("{error:#}"))]);
        stops.push(Stop { title, sql, route });
    }
    stops
}

/// Some product that is there to be asked for.
async fn any_product(stack: &Stack) -> Result<i64> {
    let client = connect(&stack.weir_dsn("shop")).await?;
    Ok(client.query_one("SELECT min(product_id) FROM products", &[]).await?.try_get(0)?)
}

async fn route(stack: &Stack, sql: &str) -> Result<Vec<(String, String)>> {
    let client = connect(&stack.weir_dsn("weir")).await?;
    let mut said = Vec::new();
    for message in client.simple_query(&format!("ROUTE shop '{}'", sql.replace('\'', "''"))).await? {
        if let SimpleQueryMessage::Row(row) = message {
            let column = |index: usize| row.try_get(index).ok().flatten().unwrap_or_default().to_owned();
            said.push((column(0), column(1)));
        }
    }
    Ok(said)
}

async fn connect(dsn: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(dsn, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
