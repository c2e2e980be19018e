//! Into which pieces a copy is cut, so that several connections can work at it.
//!
//! Invariant: every page of every table is in exactly one piece, those that a table gets later in its last one. Non-goals: how many work
//! at once, and how long a piece takes.

/// Pages of one table, by its number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    pub table: usize,
    /// The first page.
    pub from: u64,
    /// The page behind the last one; `None`: to the end.
    pub to: Option<u64>,
    /// As many as there were.
    pub pages: u64,
}

/// Cuts tables, whose pages are given, into pieces of at most so many; the largest table first, for what is begun late should be small.
pub fn cut(pages: &[u64], most: u64) -> Vec<Piece> {
    let mut tables: Vec<usize> = (0..pages.len()).collect();
    tables.sort_by_key(|table| std::cmp::Reverse(pages[*table]));
    let mut pieces = Vec::new();
    for table in tables {
        let (mut from, size) = (0, pages[table]);
        while size - from > most {
            pieces.push(Piece { table, from, to: Some(from + most), pages: most });
            from += most;
        }
        pieces.push(Piece { table, from, to: None, pages: size - from });
    }
    pieces
}

impl Piece {
    /// As a condition that Postgres 14 answers with a scan of just these pages; `None`: they are all.
    pub fn condition(&self) -> Option<String> {
        let from = (self.from > 0).then(|| format!("ctid >= '({},0)'::pg_catalog.tid", self.from));
        let to = self.to.map(|to| format!("ctid < '({to},0)'::pg_catalog.tid"));
        match (from, to) {
            (Some(from), Some(to)) => Some(format!("{from} AND {to}")),
            (from, to) => from.or(to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_in_one_piece() {
        let piece = |table, from, to, pages| Piece { table, from, to, pages };
        assert_eq!(
            cut(&[0, 25, 10], 10),
            [
                piece(1, 0, Some(10), 10),
                piece(1, 10, Some(20), 10),
                piece(1, 20, None, 5),
                piece(2, 0, None, 10),
                piece(0, 0, None, 0)
            ]
        );
        assert_eq!(cut(&[], 10), []);
    }

    #[test]
    fn pieces_are_conditions() {
        let conditions: Vec<_> = cut(&[25], 10).iter().map(Piece::condition).collect();
        assert_eq!(conditions[0].as_deref(), Some("ctid < '(10,0)'::pg_catalog.tid"));
        assert_eq!(
            conditions[1].as_deref(),
            Some("ctid >= '(10,0)'::pg_catalog.tid AND ctid < '(20,0)'::pg_catalog.tid")
        );
        assert_eq!(conditions[2].as_deref(), Some("ctid >= '(20,0)'::pg_catalog.tid"));
        assert_eq!(cut(&[5], 10)[0].condition(), None);
    }
}
