//! Which relation a column name belongs to, by Postgres's rules (src/backend/parser/parse_relation.c): the innermost
//! scope that has it wins.

use std::rc::Rc;

use sqlparser::ast::{Ident, ObjectName};

use super::env::NodeId;
use crate::sql::facts::KeySet;
use crate::topology::KeyType;

/// A column of a range-table entry.
#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    pub family: Option<KeyType>,
    pub byte_order: bool,
    pub type_oid: u32,
}

/// What is known of the columns of a range-table entry.
#[derive(Clone, Debug)]
pub enum Columns {
    /// All of them, in order.
    Known(Rc<[Column]>),
    /// A declared table the catalogue does not have: only its key.
    KeyOnly(Column),
    Unknown,
}

impl Columns {
    pub fn get(&self, name: &str) -> Option<&Column> {
        match self {
            Columns::Known(columns) => columns.iter().find(|column| column.name == name),
            Columns::KeyOnly(column) => (column.name == name).then_some(column),
            Columns::Unknown => None,
        }
    }

    fn complete(&self) -> bool {
        matches!(self, Columns::Known(_))
    }
}

/// One name in FROM.
#[derive(Clone, Debug)]
pub struct Entry {
    pub owner: usize,
    /// Alias, or the relation's own name.
    pub name: String,
    pub columns: Columns,
}

/// An output column of a sub-query.
#[derive(Clone, Debug)]
pub struct Output {
    pub column: Option<Column>,
    pub node: Option<NodeId>,
    pub keys: Option<KeySet>,
}

/// Output columns of a query; `None`: their number is not known.
pub type Outputs = Option<Vec<Output>>;

/// A WITH query in scope.
#[derive(Clone, Debug)]
pub struct CteEntry {
    pub name: String,
    pub outputs: Outputs,
}

/// Names visible in one block, and the block around it.
#[derive(Default, Debug)]
pub struct Scope<'p> {
    pub parent: Option<&'p Scope<'p>>,
    pub entries: Vec<Entry>,
    /// USING columns: the bare name means this entry's column.
    pub merged: Vec<(String, Option<usize>)>,
    pub ctes: Vec<CteEntry>,
}

/// The entry a column name stands for, and the column.
pub struct Resolved<'s> {
    pub entry: &'s Entry,
    pub column: &'s Column,
    /// Is it of the block itself, not of one around it?
    pub local: bool,
}

impl<'p> Scope<'p> {
    pub fn inside(parent: &'p Scope<'p>) -> Self {
        Scope { parent: Some(parent), ..Scope::default() }
    }

    pub fn cte(&self, name: &str) -> Option<&CteEntry> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some(found) = here.ctes.iter().rev().find(|cte| cte.name == name) {
                return Some(found);
            }
            scope = here.parent;
        }
        None
    }

    /// `None`: not certain.
    pub fn bare(&self, name: &str) -> Option<Resolved<'_>> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some((_, owner)) = here.merged.iter().find(|(merged, _)| merged == name) {
                let entry = here.entries.iter().find(|entry| Some(entry.owner) == *owner)?;
                let column = entry.columns.get(name)?;
                return Some(Resolved { entry, column, local: std::ptr::eq(here, self) });
            }
            // Two that certainly have it would be an error of the server's ("ambiguous").
            for entry in &here.entries {
                if let Some(column) = entry.columns.get(name) {
                    return Some(Resolved { entry, column, local: std::ptr::eq(here, self) });
                }
            }
            if here.entries.iter().any(|entry| !entry.columns.complete()) {
                return None;
            }
            scope = here.parent;
        }
        None
    }

    pub fn qualified(&self, table: &str, name: &str) -> Option<Resolved<'_>> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some(entry) = here.entries.iter().find(|entry| entry.name == table) {
                let column = entry.columns.get(name)?;
                return Some(Resolved { entry, column, local: std::ptr::eq(here, self) });
            }
            scope = here.parent;
        }
        None
    }

    pub fn resolve(&self, parts: &[Ident]) -> Option<Resolved<'_>> {
        match parts {
            [name] => self.bare(&ident(name)),
            [table, name] => self.qualified(&ident(table), &ident(name)),
            [_, table, name] => self.qualified(&ident(table), &ident(name)),
            _ => None,
        }
    }
}

/// A name as Postgres stores it: folded to lower case unless quoted.
pub fn ident(ident: &Ident) -> String {
    if ident.quote_style.is_none() { ident.value.to_ascii_lowercase() } else { ident.value.clone() }
}

/// The parts of a dotted name; `None` for what is not a plain name.
pub fn name_parts(name: &ObjectName) -> Option<Vec<String>> {
    name.0.iter().map(|part| part.as_ident().map(ident)).collect()
}
