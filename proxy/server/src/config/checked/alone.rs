//! Whether somebody else writes in the same database unheard: other weirs, and other databases of this file.

use toml::Spanned;

use super::{Checked, choice};
use crate::config::error::Source;
use crate::config::{DatabaseConfig, Endpoint, OtherWeirs, raw};

const HINT: &str = "leave one of them out, or set cache.enabled = false and leave out their replicas; with \
                    cache.other_weirs = \"ignore\" one may show less than the other has written";

pub(super) fn other_weirs(source: &Source, raw: &raw::Cache) -> Checked<OtherWeirs> {
    let options = [("check", OtherWeirs::Check), ("ignore", OtherWeirs::Ignore)];
    let given = raw.other_weirs.as_ref();
    given.map_or(Ok(OtherWeirs::Check), |word| choice(source, word, "other_weirs", &options))
}

/// Errors: two of the databases are one on a server, and something else than that server may answer reads. Each keeps account
/// of its own writes only.
pub(super) fn check(
    source: &Source,
    file: &raw::File,
    databases: &[DatabaseConfig],
    wildcard: Option<&DatabaseConfig>,
) -> Checked<()> {
    if other_weirs(source, &file.cache)? == OtherWeirs::Ignore {
        return Ok(());
    }
    let caches = file.cache.enabled.unwrap_or(true);
    for (index, database) in databases.iter().enumerate() {
        let place = |name: &str| file.database.keys().find(|key| key.get_ref() == name).map_or(0..0, Spanned::span);
        let refused = |other: &str| {
            let message = format!(
                "databases `{}` and `{other}` are one on the server: neither would know of the other's writes",
                database.name
            );
            source.error(place(&database.name), message).hint(HINT)
        };
        let matters = |other: &DatabaseConfig| caches || has_replicas(database) || has_replicas(other);
        let same = |other: &&DatabaseConfig| {
            other.server_database == database.server_database && share_servers(other, database) && matters(other)
        };
        if let Some(other) = databases[..index].iter().find(same) {
            return Err(refused(&other.name));
        }
        // The wildcard serves every name that is not taken here.
        let reaches = |any: &&DatabaseConfig| {
            let named = databases.iter().any(|other| other.name == database.server_database);
            !named && share_servers(any, database) && matters(any)
        };
        if let Some(any) = wildcard.filter(reaches) {
            return Err(refused(&any.name));
        }
    }
    Ok(())
}

fn servers(database: &DatabaseConfig) -> impl Iterator<Item = &Endpoint> {
    database.shards.iter().flat_map(|shard| std::iter::once(&shard.primary).chain(&shard.replicas))
}

fn share_servers(one: &DatabaseConfig, other: &DatabaseConfig) -> bool {
    servers(one).any(|server| servers(other).any(|another| another == server))
}

fn has_replicas(database: &DatabaseConfig) -> bool {
    database.shards.iter().any(|shard| !shard.replicas.is_empty())
}
