//! Statements whose GROUP BY had to be edited for the engine, with the edited text, so that they are asked once the next time.
//!
//! Invariant: an edited text is found only for the very text that the home shard has taken as it is: under the same catalogue, build of
//! the engine, user and settings. Builds tell primary keys apart, so one that is gone, behind whichever proxy, is noticed.
//! Non-goals: the edit ([`weir_core::plan::grouped_too`]), and when it may be made (`exec/ungrouped.rs`).

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use weir_core::session::vars::VarSet;

/// What all of them may weigh.
const BYTES_MAX: u64 = 2 << 20;
const ENTRY_BYTES: u64 = 256;

/// What an edit holds for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Asker {
    pub view_version: u64,
    pub token: String,
    pub user: Arc<str>,
    pub sql: Box<str>,
    /// Of its parameters, as declared.
    pub types: Box<[u8]>,
}

#[derive(Clone)]
struct ByText;

impl Weighter<Asker, Arc<Edit>> for ByText {
    fn weight(&self, key: &Asker, edit: &Arc<Edit>) -> u64 {
        ENTRY_BYTES + (key.sql.len() + key.types.len() + edit.sql.len()) as u64
    }
}

struct Edit {
    settings: VarSet,
    sql: Box<str>,
}

pub struct Mended(Cache<Asker, Arc<Edit>, ByText>);

impl Mended {
    pub fn new() -> Self {
        Mended(Cache::with_weighter((BYTES_MAX / ENTRY_BYTES / 4) as usize, BYTES_MAX, ByText))
    }

    /// The edited text.
    pub fn find(&self, asker: &Asker, settings: &VarSet) -> Option<String> {
        let edit = self.0.get(asker).filter(|edit| edit.settings == *settings)?;
        Some(edit.sql.to_string())
    }

    pub fn keep(&self, asker: Asker, settings: VarSet, sql: &str) {
        self.0.insert(asker, Arc::new(Edit { settings, sql: sql.into() }));
    }
}
