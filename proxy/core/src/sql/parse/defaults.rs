//! Which columns a write leaves to their defaults, as far as those may differ from server to server.

use sqlparser::ast::{Assignment, AssignmentTarget, Expr, Insert, SetExpr};

use super::analyse::Analyser;
use super::scope::name_parts;
use crate::sql::facts::TableName;
use crate::topology::Placement;
use crate::topology::catalog::{Column, DefaultKind};

impl Analyser<'_> {
    /// Notes the differing defaults an INSERT takes. `outputs`: how many columns its source has, where that is known.
    pub fn inserted_defaults(&mut self, insert: &Insert, table: &TableName, outputs: Option<usize>) {
        let Some(all) = self.differing(table) else { return };
        let listed: Option<Vec<String>> = (!insert.columns.is_empty()).then(|| {
            insert
                .columns
                .iter()
                .map(|column| name_parts(column).unwrap_or_default().pop().unwrap_or_default())
                .collect()
        });
        let rows = match insert.source.as_deref().map(|source| &*source.body) {
            Some(SetExpr::Values(values)) => values.rows.as_slice(),
            _ => &[],
        };
        let width = rows.first().map(|row| row.content.len()).or(outputs).unwrap_or(0);
        for (position, name) in all {
            let at = match &listed {
                Some(listed) => listed.iter().position(|column| *column == *name),
                None => (position < width).then_some(position),
            };
            let given = insert.source.is_some()
                && at.is_some_and(|at| !rows.iter().any(|row| row.content.get(at).is_none_or(is_default)));
            if !given {
                self.differing_defaults.push((table.clone(), name));
            }
        }
    }

    /// Notes `SET column = DEFAULT`.
    pub fn assigned_defaults(&mut self, assignments: &[Assignment], table: &TableName) {
        let Some(all) = self.differing(table) else { return };
        for assignment in assignments {
            let names = match &assignment.target {
                AssignmentTarget::ColumnName(name) => std::slice::from_ref(name),
                AssignmentTarget::Tuple(names) => names,
            };
            let defaults = match &assignment.value {
                Expr::Tuple(values) => values.iter().any(is_default),
                value => is_default(value),
            };
            for name in names.iter().filter(|_| defaults).filter_map(|name| name_parts(name)?.pop()) {
                if all.iter().any(|(_, column)| **column == *name) {
                    self.differing_defaults.push((table.clone(), name.into()));
                }
            }
        }
    }

    /// Columns whose defaults may differ, with their positions: of a reference table all, of a sharded table those that draw from a
    /// sequence, which would count on each shard for itself. `None` for other tables.
    fn differing(&self, table: &TableName) -> Option<Vec<(usize, Box<str>)>> {
        let name = (table.schema.clone(), table.name.clone());
        let drawn = self.schema.catalog.drawn.get(&name);
        let is_drawn = |column: &Column| drawn.is_some_and(|drawn| drawn.iter().any(|one| one.column == column.name));
        let sharded = match self.schema.placement(table) {
            Placement::Reference => false,
            Placement::Sharded { .. } => true,
            Placement::Global => return None,
        };
        let columns = self.schema.relation(table)?.columns.iter().enumerate();
        let differing = columns.filter(
            |(_, column)| {
                if sharded { is_drawn(column) } else { column.default == DefaultKind::Differs }
            },
        );
        Some(differing.map(|(position, column)| (position, column.name.clone())).collect())
    }
}

/// The parser reads DEFAULT as a name.
fn is_default(expr: &Expr) -> bool {
    matches!(expr, Expr::Identifier(name) if name.quote_style.is_none() && name.value.eq_ignore_ascii_case("default"))
}
