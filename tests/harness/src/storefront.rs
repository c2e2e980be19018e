//! The storefront under test, on plain Postgres or on weir: it only ever sees a DSN.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use weir_local::{Run, StorefrontSpec};

use crate::binary;

/// Tests register many users and attack none: hashing at full cost would be most of their time.
const CHEAP_PASSWORDS: [(&str, &str); 2] = [("STOREFRONT_ARGON2_KIB", "256"), ("STOREFRONT_ARGON2_PASSES", "1")];

/// A running storefront with its tables made. Dropping it stops it.
#[derive(Debug)]
pub struct Storefront {
    process: weir_local::Storefront,
    binary: PathBuf,
    dsn: String,
    _run: Arc<Run>,
}

impl Deref for Storefront {
    type Target = weir_local::Storefront;

    fn deref(&self) -> &weir_local::Storefront {
        &self.process
    }
}

impl Storefront {
    /// Starts the storefront of this build on free ports, makes its tables, and waits until it serves.
    pub async fn start(dsn: &str) -> Result<Self> {
        let binary = binary("STOREFRONT_BIN", "storefront")?;
        let run = Run::temporary("storefront")?;
        let spec = StorefrontSpec {
            label: "storefront".to_owned(),
            binary: binary.clone(),
            database_url: dsn.to_owned(),
            port: 0,
            environment: CHEAP_PASSWORDS
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let process = weir_local::Storefront::start(&run, &spec).await?;
        Ok(Self { process, binary, dsn: dsn.to_owned(), _run: run })
    }

    /// Loads the generated catalogue, which needs no network.
    pub async fn load_generated(&self) -> Result<()> {
        weir_local::Storefront::command(&self.binary, &["load", "--generated"], &self.dsn).await
    }
}
