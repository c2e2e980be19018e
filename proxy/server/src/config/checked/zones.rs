//! Where this process and the servers are.

use std::collections::BTreeMap;

use toml::Spanned;

use super::{Checked, endpoint, non_empty, variable};
use crate::config::Zones;
use crate::config::error::Source;

pub(super) fn zones(
    source: &Source,
    (zone, zone_env): (Option<&Spanned<String>>, Option<&Spanned<String>>),
    servers: &BTreeMap<Spanned<String>, Spanned<String>>,
) -> Checked<Zones> {
    let own = match (zone, zone_env) {
        (Some(_), Some(other)) => return Err(source.error(other.span(), "say zone or zone_env, not both")),
        (Some(zone), None) => Some(non_empty(source, zone, "zone")?),
        (None, Some(name)) => Some(variable(source, name)?).filter(|zone| !zone.is_empty()),
        (None, None) => None,
    };
    let server = |(server, zone): (&Spanned<String>, &Spanned<String>)| {
        Ok((endpoint(source, server)?, non_empty(source, zone, "a zone")?))
    };
    Ok(Zones { own, servers: servers.iter().map(server).collect::<Checked<_>>()? })
}
