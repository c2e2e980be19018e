//! Is this still the database it was? One of the wildcard entry may be dropped, and another made under its name, behind weir.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use weir_core::error::UserError;

use super::Database;

impl Database {
    /// What tells this database from others of the same name before and after it, in the cache.
    pub fn identity(&self) -> arc_swap::Guard<Arc<String>> {
        self.identity.load()
    }

    /// May it have been dropped since it was last looked at? Nobody can drop it while a connection is open.
    pub fn is_suspect(&self) -> bool {
        self.on_demand && self.suspect.load(Relaxed)
    }

    /// Asks the home shard whether the database is there, and which one it is. Errors: the server's own refusal.
    pub async fn verify(&self) -> Result<(), UserError> {
        self.suspect.store(false, Relaxed);
        let number = match crate::databases::number_of(&self.catalog_login).await {
            Ok(number) => number,
            Err(error) => {
                self.suspect.store(true, Relaxed);
                return Err(error);
            }
        };
        let identity = format!("{}/{number}", self.name);
        if **self.identity.load() != identity {
            let first = **self.identity.load() == *self.name;
            self.identity.store(Arc::new(identity));
            if !first {
                tracing::info!(database = %self.name, "it has been dropped and made anew");
                self.refresh_catalog().await;
            }
        }
        Ok(())
    }
}
