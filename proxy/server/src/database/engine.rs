//! The fallback engine's part in a database: its pools, and when it is told of changes.

use std::sync::Arc;

use weir_core::pool::Bounds;

use super::Database;
use crate::auth::credential::Keyring;
use crate::back::connect::Login;
use crate::back::pool::{Pool, PoolLimits};
use crate::config::{Config, PoolConfig};
use crate::engine::Engine;

impl Database {
    pub(super) fn engine_pool(
        &self,
        engine: &Engine,
        (config, user): (&Config, &str),
        wanted: &PoolConfig,
        keyring: &Keyring,
    ) -> Arc<Pool> {
        let login = Login {
            host: engine.endpoint.host.as_str().into(),
            port: engine.endpoint.port,
            user: user.into(),
            database: engine.database.as_str().into(),
            credential: keyring.clone(),
            tls: engine.tls().clone(),
            deadline: config.limits.connect_time_max,
        };
        let limits = self.pool_limits(config, wanted);
        let bounds = Bounds { size: engine.config.pool_size, reserve: 0, ..limits.bounds };
        let pool = Pool::new(format!("{}/engine", self.name), login, PoolLimits { bounds, min: 0, ..limits });
        if self.is_paused() {
            pool.pause();
        }
        pool
    }

    /// Replaces the engine's server connections: they have the settings of before.
    pub fn reconnect_engine(&self) {
        let pools = self.all_pools();
        pools.iter().filter_map(|(_, pools)| pools.engine.as_ref()).for_each(|pool| pool.reconnect());
    }

    pub(super) fn note_change(&self) {
        if let Some(engine) = &self.engine {
            engine.note_change();
        }
    }
}
