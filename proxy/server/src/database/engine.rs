//! The fallback engine's part in a database: its pools, and when it is told of changes.

use std::sync::Arc;

use weir_core::pool::Bounds;

use super::Database;
use crate::auth::credential::Keyring;
use crate::back::connect::Login;
use crate::back::pool::{Pool, PoolLimits};
use crate::config::{Config, PoolConfig};
use crate::engine::{Engine, HubServer};
use crate::roles::Route;

/// One user's pools on the hub's servers.
pub struct EnginePools {
    pub primary: Arc<Pool>,
    pub replicas: Vec<Arc<Pool>>,
}

impl EnginePools {
    pub fn of(&self, server: HubServer) -> &Arc<Pool> {
        match server {
            HubServer::Primary => &self.primary,
            HubServer::Replica(number) => &self.replicas[number],
        }
    }

    /// Could a statement begin there now?
    pub fn have_room(&self, server: HubServer) -> bool {
        let counts = self.of(server).counts();
        counts.waiting == 0 && counts.busy < counts.size
    }
}

impl Database {
    pub(super) fn engine_pools(
        &self,
        engine: &Engine,
        (config, user): (&Config, &str),
        wanted: &PoolConfig,
        keyring: &Keyring,
    ) -> EnginePools {
        let pool = |server| self.engine_pool(engine, server, (config, user), (wanted, keyring));
        EnginePools {
            primary: pool(HubServer::Primary),
            replicas: (0..engine.replicas.len()).map(|number| pool(HubServer::Replica(number))).collect(),
        }
    }

    fn engine_pool(
        &self,
        engine: &Engine,
        server: HubServer,
        (config, user): (&Config, &str),
        (wanted, keyring): (&PoolConfig, &Keyring),
    ) -> Arc<Pool> {
        let (route, name) = match server {
            HubServer::Primary => (engine.route.clone(), format!("{}/engine", self.name)),
            HubServer::Replica(number) => {
                let at = Arc::new(engine.replicas[number].endpoint.clone());
                (Route::Server(at), format!("{}/engine/replica{number}", self.name))
            }
        };
        let login = Login {
            route,
            user: user.into(),
            database: engine.database.as_str().into(),
            credential: keyring.clone(),
            tls: engine.tls().clone(),
            deadline: config.limits.connect_time_max,
        };
        let pool = Pool::for_key(name, login, self.engine_limits(engine, config, wanted), "engine.pool_size");
        if self.is_paused() {
            pool.pause();
        }
        pool
    }

    /// Of a pool on a server of the hub.
    pub(super) fn engine_limits(&self, engine: &Engine, config: &Config, wanted: &PoolConfig) -> PoolLimits {
        let limits = self.pool_limits(config, wanted);
        let bounds = Bounds { size: engine.config.pool_size, reserve: 0, ..limits.bounds };
        let wait_max = engine.config.wait_max.unwrap_or(limits.wait_max);
        PoolLimits { bounds, min: 0, wait_max, ..limits }
    }

    /// Replaces the engine's connections to the hub's primary: they have the settings of before.
    pub fn reconnect_engine(&self) {
        self.reconnect_engine_on(HubServer::Primary);
    }

    /// Replaces those to a replica of it.
    pub fn reconnect_engine_replica(&self, number: usize) {
        self.reconnect_engine_on(HubServer::Replica(number));
    }

    fn reconnect_engine_on(&self, server: HubServer) {
        let pools = self.all_pools();
        pools.iter().filter_map(|(_, pools)| pools.engine.as_ref()).for_each(|pools| pools.of(server).reconnect());
    }

    pub(super) fn note_change(&self) {
        if let Some(engine) = &self.engine {
            engine.note_change();
        }
    }
}
