//! Applies the schema: one statement at a time, each of which can be run again.
//!
//! Invariant: a second run, or two at once, ends with the same schema. Non-goal: changing tables that exist; the first
//! release has nothing to change.

use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::error::SqlState;

use super::{Db, StoreError};

const SCHEMA: &str = include_str!("schema.sql");
const ATTEMPTS_MAX: u32 = 5;

/// Creates what is missing.
pub async fn migrate(db: &Db) -> anyhow::Result<()> {
    let client = db.dedicated().await.context("cannot connect to migrate")?;
    for statement in statements(SCHEMA) {
        let mut attempt = 1;
        // IF NOT EXISTS looks before it creates: of two instances that start at once one may be refused, and then finds it.
        while let Err(error) = client.batch_execute(&statement).await {
            let raced = error.code().is_some_and(|code| {
                [SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_TABLE, SqlState::DUPLICATE_OBJECT].contains(code)
            });
            if !raced || attempt == ATTEMPTS_MAX {
                let first_line = statement.lines().next().unwrap_or_default().to_owned();
                return Err(StoreError::of(error)).context(format!("while migrating: {first_line}"));
            }
            tokio::time::sleep(Duration::from_millis(50) * attempt).await;
            attempt += 1;
        }
    }
    Ok(())
}

/// The statements of a script that holds no semicolon inside one, without comments.
fn statements(script: &str) -> impl Iterator<Item = String> {
    let lines: Vec<&str> = script.lines().filter(|line| !line.trim_start().starts_with("--")).collect();
    let text = lines.join("\n");
    text.split(';').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_can_be_run_again() {
        let all: Vec<String> = statements(SCHEMA).collect();
        assert!(all.len() > 15, "{}", all.len());
        for statement in &all {
            assert!(statement.starts_with("CREATE ") && statement.contains(" IF NOT EXISTS "), "{statement}");
        }
    }
}
