//! A small result: columns, rows, and the tag that ends it.

/// How a column is typed for the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// text, OID 25.
    Text,
    /// int8, OID 20.
    Int8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Column {
    pub name: &'static str,
    pub kind: Kind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cell {
    Null,
    Text(String),
    Int(i64),
}

/// A complete answer. Without columns it is only its tag; with an empty tag as well, it answers an empty query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    pub columns: Vec<Column>,
    /// Each as long as `columns`, with cells of the column's kind or null.
    pub rows: Vec<Vec<Cell>>,
    /// Command tag, e.g. `SHOW`.
    pub tag: &'static str,
}

impl Table {
    /// An answer without rows.
    pub fn done(tag: &'static str) -> Self {
        Table { columns: Vec::new(), rows: Vec::new(), tag }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Cell::Text(text)
    }
}

impl From<&String> for Cell {
    fn from(text: &String) -> Self {
        Cell::Text(text.clone())
    }
}

impl From<i64> for Cell {
    fn from(number: i64) -> Self {
        Cell::Int(number)
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Cell::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<u16> for Cell {
    fn from(number: u16) -> Self {
        Cell::Int(i64::from(number))
    }
}

impl From<u32> for Cell {
    fn from(number: u32) -> Self {
        Cell::Int(i64::from(number))
    }
}

/// A flag the way psql shows a boolean.
impl From<bool> for Cell {
    fn from(flag: bool) -> Self {
        Cell::from(if flag { "t" } else { "f" })
    }
}

impl<T> From<Option<T>> for Cell
where
    Cell: From<T>,
{
    fn from(value: Option<T>) -> Self {
        value.map_or(Cell::Null, Cell::from)
    }
}
