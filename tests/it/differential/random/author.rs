//! Writes random SELECTs over [`TABLES`](super::rows::TABLES): FROM lists, SELECT blocks, set operations, WITH, and how they end.
//!
//! Invariant: which rows a statement returns is decided by the data alone, so LIMIT inside a statement stands behind an
//! order without ties; what is left open is said in [`Written::order`]. Values are made in `values.rs`, blocks that group,
//! aggregate or number rows in `blocks.rs`. Non-goal: statements that anybody would want to send.

use std::fmt::Write as _;

use super::dice::Dice;
use super::rows::{TABLES, Table, Ty};
use super::values::KEYABLE;

/// Positions in `TABLES`, those of sharded tables more often.
pub const TABLE_WEIGHTS: [usize; 26] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7];

/// A statement and how far it decides the order of its rows.
pub struct Written {
    pub sql: String,
    pub parameters: Vec<String>,
    pub order: Decided,
    /// It adds floats whose sum is not exact.
    pub near: bool,
}

/// How far the order of the rows is decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decided {
    /// Rows are sorted by these columns, in this order; by none: they come in any order.
    By(Vec<usize>),
    /// Not even which rows: only how many.
    CountOnly,
}

/// An entry of a FROM list.
#[derive(Clone, Debug)]
pub struct Relation {
    pub alias: String,
    pub table: Option<&'static str>,
    pub columns: Vec<(String, Ty)>,
    /// Columns that no two rows have alike; empty: not known.
    pub unique: Vec<String>,
}

impl Relation {
    pub fn has(&self, column: &str) -> bool {
        self.columns.iter().any(|(name, _)| name == column)
    }
}

/// A SELECT without ORDER BY and what may be said of it.
pub struct Block {
    pub sql: String,
    pub columns: Vec<(String, Ty)>,
    /// Expressions that ORDER BY may use beside the columns.
    pub sortable: Vec<String>,
    /// Output columns that no two rows have alike.
    pub unique: Vec<String>,
    /// An ORDER BY that it must have.
    pub order: Option<String>,
}

pub struct Author {
    pub dice: Dice,
    pub parameters: Vec<String>,
    pub parameters_allowed: bool,
    /// Sub-queries that may still be written.
    pub subqueries: u32,
    /// Floats were added whose sum is not exact.
    pub near: bool,
    /// One table or two, no sub-queries: what a merge may be able to do.
    pub plain: bool,
    aliases: u32,
    with: Vec<Relation>,
}

impl Author {
    pub fn new(seed: u64) -> Self {
        Author {
            dice: Dice::new(seed),
            parameters: Vec::new(),
            parameters_allowed: true,
            subqueries: 2,
            near: false,
            plain: false,
            aliases: 0,
            with: Vec::new(),
        }
    }

    /// One statement.
    pub fn statement(&mut self) -> Written {
        self.parameters.clear();
        self.with.clear();
        self.plain = self.dice.percent(55);
        let subqueries = if self.plain { 0 } else { self.dice.roll(3) as u32 };
        (self.aliases, self.subqueries, self.parameters_allowed) = (0, subqueries, true);
        self.near = false;
        let mut sql = String::new();
        if !self.plain && self.dice.percent(22) {
            let parts: Vec<String> = (0..=self.dice.roll(2)).map(|_| self.common_table()).collect();
            sql = format!("WITH {} ", parts.join(", "));
        }
        let block = match self.dice.roll(100) {
            0..=19 if !self.plain => self.set_operation(),
            20..=21 => self.values_list(),
            _ => self.block(if self.plain { 0 } else { 2 }, true),
        };
        sql.push_str(&block.sql);
        let order = self.tail(&block, &mut sql);
        let parameters = self.used_parameters(&mut sql);
        if self.dice.percent(2) {
            let mistake = self.dice.pick(&["nowhere", "sum('x'::text)", "1/0", "count(*) + nothing()"]);
            sql = sql.replacen("SELECT ", &format!("SELECT {mistake}, "), 1);
        }
        let near = self.near;
        // Sums that differ in their last digits may also change places.
        let order = if near && order != Decided::CountOnly { Decided::By(Vec::new()) } else { order };
        Written { sql, parameters, order, near }
    }

    /// What was thrown away may have had parameters: those that are left, numbered anew.
    fn used_parameters(&mut self, sql: &mut String) -> Vec<String> {
        let mut used = Vec::new();
        for (at, parameter) in std::mem::take(&mut self.parameters).into_iter().enumerate() {
            let name = format!("${}::", at + 1);
            if sql.contains(&name) {
                used.push(parameter);
                *sql = sql.replace(&name, &format!("${}::", used.len()));
            }
        }
        used
    }

    fn common_table(&mut self) -> String {
        let block = self.block(1, false);
        let name = format!("w{}", self.with.len() + 1);
        let how = self.dice.pick(&["", "", "", "MATERIALIZED ", "NOT MATERIALIZED "]);
        let order = block.order.map(|order| format!(" ORDER BY {order}")).unwrap_or_default();
        self.with.push(Relation { alias: name.clone(), table: None, columns: block.columns, unique: block.unique });
        format!("{name} AS {how}({}{order})", block.sql)
    }

    fn alias(&mut self) -> String {
        self.aliases += 1;
        format!("t{}", self.aliases)
    }

    /// A table under a new name.
    pub fn named(&mut self, table: &'static Table) -> Relation {
        Relation {
            alias: self.alias(),
            table: Some(table.name),
            columns: table.columns.iter().map(|(name, ty)| ((*name).to_owned(), *ty)).collect(),
            unique: table.unique.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// One entry of a FROM list, as text too; `outer`: what a LATERAL may look at.
    fn entry(&mut self, depth: u32) -> (String, Relation) {
        match self.dice.roll(20) {
            0..=2 if depth > 0 => {
                let block = self.block(depth - 1, false);
                let alias = self.alias();
                let mut text = block.sql.clone();
                if let Some(order) = &block.order {
                    let _ = write!(text, " ORDER BY {order}");
                } else if !block.unique.is_empty() && self.dice.percent(25) {
                    let limit = 1 + self.dice.roll(20);
                    let _ = write!(text, " ORDER BY {} LIMIT {limit}", block.unique.join(", "));
                }
                let relation =
                    Relation { alias: alias.clone(), table: None, columns: block.columns, unique: block.unique };
                (format!("({text}) AS {alias}"), relation)
            }
            3..=5 if !self.with.is_empty() => {
                let at = self.dice.roll(self.with.len());
                let mut relation = self.with[at].clone();
                let name = std::mem::replace(&mut relation.alias, self.alias());
                (format!("{name} {}", relation.alias), relation)
            }
            6 if depth > 0 => {
                let alias = self.alias();
                let (text, unique) = match self.dice.roll(3) {
                    0 => (format!("generate_series(1, {}) AS {alias}(v)", 2 + self.dice.roll(4)), true),
                    1 => (format!("unnest(ARRAY[3, 1, 2]) AS {alias}(v)"), true),
                    _ => (format!("(VALUES (1), (4), (NULL)) AS {alias}(v)"), true),
                };
                let unique = if unique { vec!["v".to_owned()] } else { Vec::new() };
                (text, Relation { alias, table: None, columns: vec![("v".to_owned(), Ty::Int)], unique })
            }
            _ => {
                let table = &TABLES[self.dice.pick(&TABLE_WEIGHTS)];
                let relation = self.named(table);
                (format!("{} {}", relation.table.unwrap_or(""), relation.alias), relation)
            }
        }
    }

    /// A FROM list: its text, and what it has.
    pub fn from(&mut self, depth: u32) -> (String, Vec<Relation>) {
        let (mut text, first) = self.entry(depth);
        let mut scope = vec![first];
        let joins = self.dice.pick(if self.plain { &[0, 0, 0, 1] } else { &[0, 0, 1, 1, 1, 2, 2, 3][..] });
        let mut wide = false;
        for _ in 0..joins {
            if self.dice.percent(8) && self.lateral(&mut text, &mut scope) {
                continue;
            }
            let (entry, right) = self.entry(depth.min(1));
            let Some((condition, narrow)) = self.join_condition(&scope, &right, wide) else { continue };
            wide |= !narrow;
            let kind = self.dice.pick(&["JOIN", "JOIN", "JOIN", "INNER JOIN", "LEFT JOIN", "LEFT JOIN", "RIGHT JOIN"]);
            let full = self.dice.percent(6);
            let both = [scope.clone(), vec![right.clone()]].concat();
            let using = narrow && self.dice.percent(15) && scope.len() == 1 && condition.contains(".cid = ");
            if using {
                let _ = write!(text, " {} {entry} USING (cid)", if full { "FULL JOIN" } else { kind });
            } else if full {
                let _ = write!(text, " FULL JOIN {entry} ON {condition}");
            } else {
                let more = self.dice.percent(20).then(|| format!(" AND {}", self.predicate(&both, 0)));
                let _ = write!(text, " {kind} {entry} ON {condition}{}", more.unwrap_or_default());
            }
            scope = both;
        }
        (text, scope)
    }

    /// `JOIN LATERAL` of a table that has clients, by client.
    fn lateral(&mut self, text: &mut String, scope: &mut Vec<Relation>) -> bool {
        let Some(outer) = scope.iter().find(|relation| relation.has("cid")).map(|relation| relation.alias.clone())
        else {
            return false;
        };
        let inner = self.named(&TABLES[1]);
        let (name, alias) = (inner.alias.clone(), self.alias());
        let kind = self.dice.pick(&["CROSS JOIN LATERAL", "LEFT JOIN LATERAL"]);
        let on = if kind.starts_with('L') { " ON true" } else { "" };
        let (body, columns) = if self.dice.percent(50) {
            let limit = 1 + self.dice.roll(2);
            let body = format!(
                "SELECT {name}.no, {name}.total FROM bills {name} WHERE {name}.cid = {outer}.cid ORDER BY {name}.total DESC, {name}.cid, {name}.no LIMIT {limit}"
            );
            (body, vec![("no".to_owned(), Ty::Int), ("total".to_owned(), Ty::Big)])
        } else {
            let body = format!(
                "SELECT count(*) AS a, max({name}.status) AS b FROM bills {name} WHERE {name}.cid = {outer}.cid"
            );
            (body, vec![("a".to_owned(), Ty::Big), ("b".to_owned(), Ty::Text)])
        };
        let _ = write!(text, " {kind} ({body}) AS {alias}{on}");
        scope.push(Relation { alias, table: None, columns, unique: Vec::new() });
        true
    }

    /// How `right` is joined, and whether it is by a key; `None`: they have nothing in common.
    fn join_condition(&mut self, scope: &[Relation], right: &Relation, wide: bool) -> Option<(String, bool)> {
        let keyed: Vec<&Relation> = scope.iter().filter(|relation| relation.has("cid")).collect();
        if right.has("cid") && !keyed.is_empty() && (wide || self.dice.percent(75)) {
            let left = keyed[self.dice.roll(keyed.len())];
            let mut condition = format!("{}.cid = {}.cid", left.alias, right.alias);
            if left.has("no") && right.has("no") && self.dice.percent(60) {
                let _ = write!(condition, " AND {}.no = {}.no", left.alias, right.alias);
            }
            return Some((condition, true));
        }
        for shared in ["pid", "kind"] {
            if let (true, Some(left)) = (right.has(shared), scope.iter().find(|relation| relation.has(shared)))
                && self.dice.percent(80)
            {
                return Some((format!("{}.{shared} = {}.{shared}", left.alias, right.alias), false));
            }
        }
        if wide {
            return None;
        }
        for _ in 0..4 {
            let ty = self.dice.pick(&[Ty::Int, Ty::Big, Ty::Date, Ty::Text, Ty::Uuid]);
            if let (Some(left), Some(right)) = (self.column(scope, ty), self.column(std::slice::from_ref(right), ty)) {
                return Some((format!("{left} = {right}"), false));
            }
        }
        None
    }

    /// WHERE, or nothing.
    pub fn filter(&mut self, scope: &[Relation], depth: u32) -> String {
        let mut conditions = Vec::new();
        if self.dice.percent(22) {
            conditions.extend(self.key_predicate(scope));
        }
        if self.dice.percent(45) {
            conditions.push(self.predicate(scope, depth));
        }
        if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) }
    }

    /// UNION, INTERSECT, EXCEPT of blocks with the same types.
    fn set_operation(&mut self) -> Block {
        let types: Vec<Ty> = (0..=self.dice.roll(3)).map(|_| self.dice.pick(&KEYABLE)).collect();
        let first = self.plain_block(1, Some(&types));
        let mut sql = first.sql;
        for _ in 0..=usize::from(self.dice.percent(20)) {
            let operator = self.dice.pick(&[
                "UNION",
                "UNION ALL",
                "UNION ALL",
                "INTERSECT",
                "EXCEPT",
                "EXCEPT ALL",
                "INTERSECT ALL",
            ]);
            let next = self.plain_block(1, Some(&types));
            sql = format!("{sql} {operator} {}", next.sql);
        }
        Block { sql, columns: first.columns, sortable: Vec::new(), unique: Vec::new(), order: None }
    }

    fn values_list(&mut self) -> Block {
        let types: Vec<Ty> = (0..=self.dice.roll(2)).map(|_| self.dice.pick(&KEYABLE)).collect();
        let row = |author: &mut Self| {
            let values: Vec<String> = types.iter().map(|ty| author.literal(*ty)).collect();
            format!("({})", values.join(", "))
        };
        let rows: Vec<String> = (0..=self.dice.roll(3)).map(|_| row(self)).collect();
        let columns = types.iter().enumerate().map(|(at, ty)| (format!("column{}", at + 1), *ty)).collect();
        let sql = format!("VALUES {}", rows.join(", "));
        Block { sql, columns, sortable: Vec::new(), unique: Vec::new(), order: None }
    }

    /// ORDER BY, LIMIT, OFFSET, FETCH at the end of a statement.
    fn tail(&mut self, block: &Block, sql: &mut String) -> Decided {
        if let Some(order) = &block.order {
            let _ = write!(sql, " ORDER BY {order}");
            return Decided::By(Vec::new());
        }
        let firm = |ty: Ty| !matches!(ty, Ty::Soft | Ty::Rough | Ty::Json | Ty::Words | Ty::Ints);
        let all_firm = block.columns.iter().all(|column| firm(column.1));
        let width = block.columns.len();
        match self.dice.roll(10) {
            0..=2 => Decided::By(Vec::new()),
            3 => {
                let _ = write!(sql, " LIMIT {}", self.dice.roll(30));
                if self.dice.percent(30) {
                    let _ = write!(sql, " OFFSET {}", self.dice.roll(10));
                }
                Decided::CountOnly
            }
            4..=5 => {
                let some: Vec<usize> = (0..=self.dice.roll(2)).map(|_| self.dice.roll(width)).collect();
                let hidden = !block.sortable.is_empty() && self.dice.percent(25);
                let mut keys = Vec::new();
                if hidden {
                    keys.push(block.sortable[self.dice.roll(block.sortable.len())].clone());
                }
                keys.extend(some.iter().map(|at| self.order_item(block, *at)));
                let keys: Vec<String> = keys.into_iter().map(|key| key + self.direction()).collect();
                let _ = write!(sql, " ORDER BY {}", keys.join(", "));
                if !hidden
                    && some.iter().all(|at| firm(block.columns[*at].1))
                    && self.dice.percent(25)
                    && !indexed_extreme(sql)
                {
                    let _ = write!(sql, " FETCH FIRST {} ROWS WITH TIES", 1 + self.dice.roll(12));
                }
                let visible = |at: &usize| firm(block.columns[*at].1);
                Decided::By(if hidden { Vec::new() } else { some.into_iter().filter(visible).collect() })
            }
            _ => {
                let start = self.dice.roll(width);
                let all: Vec<usize> = (0..width).map(|at| (start + at) % width).collect();
                let keys: Vec<String> = all.iter().map(|at| self.order_item(block, *at) + self.direction()).collect();
                let _ = write!(sql, " ORDER BY {}", keys.join(", "));
                if all_firm {
                    self.limit(sql);
                }
                Decided::By(all.into_iter().filter(|at| firm(block.columns[*at].1)).collect())
            }
        }
    }

    fn order_item(&mut self, block: &Block, at: usize) -> String {
        if self.dice.percent(60) { (at + 1).to_string() } else { block.columns[at].0.clone() }
    }

    fn direction(&mut self) -> &'static str {
        self.dice.pick(&["", "", "", " ASC", " DESC", " DESC", " NULLS FIRST", " DESC NULLS LAST", " ASC NULLS FIRST"])
    }

    fn limit(&mut self, sql: &mut String) {
        let (count, skip) = (self.dice.roll(25), self.dice.roll(12));
        let end = match self.dice.roll(9) {
            0 | 1 => format!(" LIMIT {count}"),
            2 => format!(" LIMIT {count} OFFSET {skip}"),
            3 => format!(" OFFSET {skip} LIMIT {count}"),
            4 => format!(" OFFSET {skip} ROWS FETCH NEXT {} ROWS ONLY", count + 1),
            5 if !indexed_extreme(sql) => format!(" FETCH FIRST {} ROWS WITH TIES", count + 1),
            6 => format!(" LIMIT {count} + 1"),
            7 => format!(" OFFSET {skip}"),
            _ => String::new(),
        };
        sql.push_str(&end);
    }
}

/// Postgres 15 itself fails on `SELECT min(constant) … FETCH FIRST n ROWS WITH TIES`: its plan for min and its like takes the ties
/// into the sub-query that looks for one row (planagg.c).
fn indexed_extreme(sql: &str) -> bool {
    !sql.contains("GROUP BY")
        && ["min(", "max(", "every(", "bool_and(", "bool_or("].iter().any(|name| sql.contains(name))
}
