//! Whether the rows of an INSERT can be dealt out to several shards.

use super::super::deal::Deal;
use super::super::functions::{Harm, harmless_by_row, worst};
use super::{Compiler, Placed, Source};
use crate::sql::facts::{Facts, Instance, Verb};
use crate::sql::rows::Rows;
use crate::topology::Placement;
use crate::topology::catalog::RelationKind;

impl Compiler<'_> {
    /// `Err`: why its rows must stay together. `demand`: where the keys of the rows are.
    pub(super) fn deal(
        &self,
        facts: &Facts,
        placed: &Placed<'_>,
        source: Source<'_>,
        demand: Option<usize>,
    ) -> Result<Deal, String> {
        if facts.verb != Verb::Insert {
            return Err("it is no INSERT".into());
        }
        let rows = Rows::find(source.text, source.tokens).filter(|_| !facts.writes_in_with && !facts.with);
        let rows = rows.ok_or("it is no plain INSERT … VALUES")?;
        let [target] = placed.sharded.as_slice() else { return Err("it reads other sharded rows".into()) };
        let Placement::Sharded { key, key_type } = self.schema.placement(&target.table) else {
            return Err("its tables changed meanwhile".into());
        };
        let keys = target.keys.as_ref().map_or(0, |keys| keys.terms.len());
        let Some(demand) = demand.filter(|_| keys == rows.rows.len()) else {
            return Err("weir cannot tell its rows apart".into());
        };
        if let Some(table) = placed.global.first() {
            return Err(format!("{} lives on the home shard only", table.table));
        }
        if facts.limited_subquery {
            return Err("it has a sub-query that returns only some of its rows".into());
        }
        if facts.locks_rows {
            return Err("it locks rows".into());
        }
        if facts.server_bound {
            return Err("it asks for what differs between servers (ctid, xmin)".into());
        }
        let catalog = self.schema.catalog;
        let harmful = facts.functions.iter().find(|function| {
            worst(std::slice::from_ref(*function), catalog) >= Harm::Volatile && !harmless_by_row(function, catalog)
        });
        if let Some(function) = harmful {
            return Err(format!("{}() is not known to be the same for a part of the rows", function.name));
        }
        let may_skip = rows.conflict || self.may_skip(target);
        Ok(Deal { rows, demand, key: key.clone(), key_type: *key_type, may_skip })
    }

    /// May the table itself take less rows than it is given?
    fn may_skip(&self, target: &Instance) -> bool {
        self.schema
            .relation(&target.table)
            .is_none_or(|relation| relation.writes_spread || relation.kind != RelationKind::PlainTable)
    }
}
