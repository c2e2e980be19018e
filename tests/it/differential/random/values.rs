//! Random values, predicates and sub-queries over the rows of a scope.
//!
//! Invariants: nothing fails at run time (no division by zero, no overflow, no scalar sub-query of two rows), nothing depends
//! on the order of rows, and a value of type `Num` always has two decimal places.

use super::author::{Author, Relation, TABLE_WEIGHTS};
use super::rows::{TABLES, Ty, cid};

/// Types whose equal values look equal, and that can be sorted.
pub const KEYABLE: [Ty; 15] = [
    Ty::Small,
    Ty::Int,
    Ty::Int,
    Ty::Big,
    Ty::Num,
    Ty::Float,
    Ty::Text,
    Ty::Text,
    Ty::Ranked,
    Ty::Date,
    Ty::Stamp,
    Ty::Zoned,
    Ty::Uuid,
    Ty::Bytes,
    Ty::Bool,
];

/// Types whose values are compared by `<`.
const COMPARED: [Ty; 11] =
    [Ty::Int, Ty::Int, Ty::Big, Ty::Small, Ty::Num, Ty::Float, Ty::Text, Ty::Ranked, Ty::Date, Ty::Stamp, Ty::Zoned];

impl Author {
    /// A column of that type, if the scope has one.
    pub fn column(&mut self, scope: &[Relation], ty: Ty) -> Option<String> {
        let all: Vec<String> = scope
            .iter()
            .flat_map(|relation| {
                relation
                    .columns
                    .iter()
                    .filter(|column| column.1 == ty)
                    .map(|column| format!("{}.{}", relation.alias, column.0))
            })
            .collect();
        (!all.is_empty()).then(|| all[self.dice.roll(all.len())].clone())
    }

    /// A client's number, if the scope has one and the dice say so.
    pub fn client(&mut self, scope: &[Relation]) -> Option<String> {
        self.column(scope, Ty::Big).filter(|column| column.rsplit('.').next() == Some("cid"))
    }

    /// A constant, sometimes as a parameter.
    pub fn literal(&mut self, ty: Ty) -> String {
        let number = self.dice.roll(25) as i64 - 3;
        let (text, cast) = match ty {
            Ty::Small => (number.min(5).to_string(), "smallint"),
            Ty::Int => (number.to_string(), "int"),
            Ty::Big => (cid(1 + number.unsigned_abs() as i64).to_string(), "bigint"),
            Ty::Num => (format!("{number}.{}", self.dice.pick(&["00", "25", "50"])), "numeric(10,2)"),
            Ty::Whole => (number.to_string(), "numeric(12,0)"),
            Ty::Soft => (number.to_string(), "numeric"),
            Ty::Float | Ty::Rough => (format!("{}.5", number.abs()), "float8"),
            Ty::Text | Ty::Ranked => {
                (self.dice.pick(&["Anna", "anna", "Zoë", "ab", "paid", "open", "n4", ""]).to_owned(), "text")
            }
            Ty::Date => (format!("2021-0{}-01", 1 + self.dice.roll(9)), "date"),
            Ty::Stamp => (format!("2024-0{}-02 10:30:00", 1 + self.dice.roll(9)), "timestamp"),
            Ty::Zoned => (format!("2025-0{}-01 07:00:00.5+00", 1 + self.dice.roll(6)), "timestamptz"),
            Ty::Uuid => (format!("00000000-0000-4000-8000-{:012x}", 4 * self.dice.roll(8)), "uuid"),
            Ty::Bytes => (format!("\\x0{}01", self.dice.roll(9)), "bytea"),
            Ty::Bool => (self.dice.pick(&["true", "false"]).to_owned(), "boolean"),
            Ty::Words => (self.dice.pick(&["{red}", "{}", "{blue,NULL}"]).to_owned(), "text[]"),
            Ty::Ints => (self.dice.pick(&["{1}", "{}", "{2,NULL}"]).to_owned(), "int[]"),
            Ty::Json => (self.dice.pick(&["{\"k\": \"1\"}", "[1]", "\"x\""]).to_owned(), "jsonb"),
        };
        let literal = if self.parameters_allowed && self.parameters.len() < 9 && self.dice.percent(20) {
            self.parameters.push(text);
            format!("${}::{cast}", self.parameters.len())
        } else {
            match ty {
                Ty::Int if number >= 0 => text,
                Ty::Bool => text,
                _ => format!("'{text}'::{cast}"),
            }
        };
        if ty == Ty::Ranked { format!("(({literal}) COLLATE \"und-x-icu\")") } else { literal }
    }

    /// A column or a constant.
    fn leaf(&mut self, scope: &[Relation], ty: Ty) -> String {
        match self.column(scope, ty) {
            Some(column) if self.dice.percent(88) => column,
            _ => self.literal(ty),
        }
    }

    /// Any value of that type.
    pub fn value(&mut self, scope: &[Relation], ty: Ty, depth: u32) -> String {
        if depth == 0 || self.dice.percent(45) {
            return self.leaf(scope, ty);
        }
        match self.dice.roll(12) {
            0 | 1 => format!("coalesce({}, {})", self.leaf(scope, ty), self.literal(ty)),
            2 => {
                let (when, then, otherwise) =
                    (self.predicate(scope, depth - 1), self.leaf(scope, ty), self.leaf(scope, ty));
                format!("CASE WHEN {when} THEN {then} ELSE {otherwise} END")
            }
            3 if !matches!(ty, Ty::Json) => format!("nullif({}, {})", self.leaf(scope, ty), self.literal(ty)),
            4 if self.subqueries > 0 && !matches!(ty, Ty::Soft | Ty::Rough | Ty::Json) => self.scalar(scope, ty),
            _ => self.computed(scope, ty, depth - 1),
        }
    }

    fn computed(&mut self, scope: &[Relation], ty: Ty, depth: u32) -> String {
        let which = self.dice.roll(6);
        let leaf = |author: &mut Self, ty| author.leaf(scope, ty);
        match (ty, which) {
            (Ty::Int, 0) => format!("({} + {})", self.value(scope, Ty::Int, depth), leaf(self, Ty::Int)),
            (Ty::Int, 1) => format!("({} * {})", leaf(self, Ty::Int), self.dice.pick(&["2", "3", "-1"])),
            (Ty::Int, 2) => format!("length({})", leaf(self, Ty::Text)),
            (Ty::Int, 3) => format!("extract(year FROM {})::int", leaf(self, Ty::Date)),
            (Ty::Int, 4) => format!("({} % 3)", leaf(self, Ty::Int)),
            (Ty::Int, _) => format!("{}::int", leaf(self, Ty::Small)),
            (Ty::Big, 0 | 1) => format!("({} % 7)", leaf(self, Ty::Big)),
            (Ty::Big, 2) => format!("{}::bigint", leaf(self, Ty::Int)),
            (Ty::Num, 0) => format!("({} + {})", leaf(self, Ty::Num), leaf(self, Ty::Num)),
            (Ty::Num, 1) => format!("({} * 2)", leaf(self, Ty::Num)),
            (Ty::Num, 2) => {
                format!("round({} / nullif({}, 0), 2)", leaf(self, Ty::Num), self.value(scope, Ty::Int, depth))
            }
            (Ty::Num, 3) => format!("{}::numeric(10,2)", leaf(self, Ty::Int)),
            (Ty::Float, 0..=2) => format!("({} + 0.5)", leaf(self, Ty::Float)),
            (Ty::Text, 0) => format!("lower({})", leaf(self, Ty::Text)),
            (Ty::Text, 1) => format!("({} || {})", leaf(self, Ty::Text), self.literal(Ty::Text)),
            (Ty::Text, 2) => format!("{}::text", leaf(self, Ty::Int)),
            (Ty::Text, 3) => format!("substr({}, 1, 2)", leaf(self, Ty::Text)),
            (Ty::Text, 4) => format!("({} ->> 'k')", leaf(self, Ty::Json)),
            (Ty::Ranked, 0..=2) => format!("upper({})", leaf(self, Ty::Ranked)),
            (Ty::Date, 0 | 1) => format!("({} + 3)", leaf(self, Ty::Date)),
            (Ty::Date, 2) => format!("{}::date", leaf(self, Ty::Stamp)),
            (Ty::Stamp, 0 | 1) => format!("date_trunc('month', {})", leaf(self, Ty::Stamp)),
            (Ty::Stamp, 2) => format!("({} + interval '1 day')", leaf(self, Ty::Stamp)),
            (Ty::Bool, 0..=3) => format!("({})", self.predicate(scope, depth)),
            (Ty::Words, 0 | 1) => format!("ARRAY[{}, {}]", leaf(self, Ty::Text), leaf(self, Ty::Text)),
            (Ty::Ints, 0 | 1) => format!("({} || 5)", leaf(self, Ty::Ints)),
            _ => leaf(self, ty),
        }
    }

    /// A condition on rows of the scope.
    pub fn predicate(&mut self, scope: &[Relation], depth: u32) -> String {
        if depth > 0 && self.dice.percent(30) {
            let (left, right) = (self.predicate(scope, depth - 1), self.predicate(scope, depth - 1));
            return match self.dice.roll(5) {
                0 => format!("NOT ({left})"),
                1 | 2 => format!("({left} OR {right})"),
                _ => format!("({left} AND {right})"),
            };
        }
        if depth > 0 && self.subqueries > 0 && self.dice.percent(22) {
            return self.subquery_predicate(scope);
        }
        let ty = self.dice.pick(&COMPARED);
        let depth = depth.min(1);
        match self.dice.roll(14) {
            0 => format!("{} IS NULL", self.leaf(scope, ty)),
            1 => format!("{} IS NOT NULL", self.leaf(scope, ty)),
            2 => format!("{} BETWEEN {} AND {}", self.leaf(scope, ty), self.literal(ty), self.literal(ty)),
            3 => format!(
                "{} {}IN ({}, {})",
                self.leaf(scope, ty),
                self.dice.pick(&["", "NOT "]),
                self.literal(ty),
                self.literal(ty)
            ),
            4 => format!("{} LIKE '{}'", self.leaf(scope, Ty::Text), self.dice.pick(&["a%", "%n%", "_aid"])),
            5 => self.leaf(scope, Ty::Bool),
            6 => format!("{} IS DISTINCT FROM {}", self.leaf(scope, ty), self.leaf(scope, ty)),
            7 => format!("{} = ANY({})", self.leaf(scope, Ty::Int), self.leaf(scope, Ty::Ints)),
            8 => format!("{} @> {}", self.leaf(scope, Ty::Words), self.literal(Ty::Words)),
            9 => format!("{} IS {}", self.leaf(scope, Ty::Bool), self.dice.pick(&["TRUE", "NOT TRUE", "UNKNOWN"])),
            _ => {
                let compare = self.dice.pick(&["=", "<>", "<", ">=", "<=", ">"]);
                format!("{} {compare} {}", self.value(scope, ty, depth), self.leaf(scope, ty))
            }
        }
    }

    /// A condition that names shard keys, if the scope has any.
    pub fn key_predicate(&mut self, scope: &[Relation]) -> Option<String> {
        let keyed: Vec<(String, Ty)> = scope
            .iter()
            .filter_map(|relation| {
                let key = match relation.table? {
                    "clients" | "bills" | "lines" => ("cid", Ty::Big),
                    "notes" => ("code", Ty::Text),
                    "tokens" => ("tid", Ty::Uuid),
                    _ => return None,
                };
                Some((format!("{}.{}", relation.alias, key.0), key.1))
            })
            .collect();
        if keyed.is_empty() {
            return None;
        }
        let (column, ty) = keyed[self.dice.roll(keyed.len())].clone();
        let key = |author: &mut Self| match ty {
            Ty::Text => format!("'{}{}'", author.dice.pick(&["n", "N", "ö"]), 1 + author.dice.roll(40)),
            _ => author.literal(ty),
        };
        Some(match self.dice.roll(6) {
            0 => format!("{column} IN ({}, {}, {})", key(self), key(self), key(self)),
            1 => format!("({column} = {} OR {column} = {})", key(self), key(self)),
            2 => format!("{column} = ANY(ARRAY[{}, {}])", key(self), key(self)),
            _ => format!("{column} = {}", key(self)),
        })
    }

    /// A table for a sub-query, and a condition that may tie it to the scope.
    fn inner(&mut self, scope: &[Relation]) -> (Relation, String) {
        let table = &TABLES[self.dice.pick(&TABLE_WEIGHTS)];
        let inner = self.named(table);
        let outer = self.client(scope);
        let mut conditions = Vec::new();
        if let (Some(outer), true, true) = (outer, inner.has("cid"), self.dice.percent(65)) {
            conditions.push(format!("{}.cid = {outer}", inner.alias));
        } else if self.dice.percent(35)
            && let (Some(left), Some(right)) =
                (self.column(std::slice::from_ref(&inner), Ty::Int), self.column(scope, Ty::Int))
        {
            conditions.push(format!("{left} = {right}"));
        }
        if self.dice.percent(50) {
            let own = [inner.clone()];
            conditions.push(self.predicate(&own, 0));
        }
        if self.dice.percent(15) {
            conditions.extend(self.key_predicate(std::slice::from_ref(&inner)));
        }
        let clause = if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
        (inner, clause)
    }

    /// A sub-query of at most one row.
    fn scalar(&mut self, scope: &[Relation], ty: Ty) -> String {
        self.subqueries -= 1;
        let (inner, clause) = self.inner(scope);
        let own = [inner.clone()];
        let from = format!("FROM {} {}{clause}", inner.table.unwrap_or(""), inner.alias);
        match ty {
            Ty::Big if self.dice.percent(50) => format!("(SELECT count(*) {from})"),
            Ty::Bool => format!("(SELECT bool_or({}) {from})", self.leaf(&own, Ty::Bool)),
            Ty::Uuid | Ty::Bytes => {
                let order = format!("{} {from} ORDER BY 1 LIMIT 1", self.leaf(&own, ty));
                format!("(SELECT {order})")
            }
            _ => format!("(SELECT {}({}) {from})", self.dice.pick(&["max", "min"]), self.value(&own, ty, 1)),
        }
    }

    fn subquery_predicate(&mut self, scope: &[Relation]) -> String {
        self.subqueries -= 1;
        let (inner, clause) = self.inner(scope);
        let own = [inner.clone()];
        let from = format!("FROM {} {}{clause}", inner.table.unwrap_or(""), inner.alias);
        match self.dice.roll(8) {
            0 | 1 => format!("EXISTS (SELECT 1 {from})"),
            2 => format!("NOT EXISTS (SELECT 1 {from})"),
            3 | 4 if inner.has("cid") && self.column(scope, Ty::Big).is_some() => {
                let outer = self.leaf(scope, Ty::Big);
                format!("{outer} {}IN (SELECT {}.cid {from})", self.dice.pick(&["", "NOT "]), inner.alias)
            }
            5 => {
                let ty = self.dice.pick(&[Ty::Int, Ty::Text, Ty::Date]);
                let many = self.dice.pick(&["> ALL", "= ANY", "<> ALL", "< ANY"]);
                format!("{} {many} (SELECT {} {from})", self.leaf(scope, ty), self.leaf(&own, ty))
            }
            6 => {
                let ty = self.dice.pick(&[Ty::Int, Ty::Text, Ty::Num]);
                format!("{} IN (SELECT {} {from})", self.leaf(scope, ty), self.leaf(&own, ty))
            }
            _ => {
                let ty = self.dice.pick(&[Ty::Int, Ty::Big, Ty::Num, Ty::Date]);
                let own_value = self.leaf(&own, ty);
                format!("{} >= (SELECT {}({own_value}) {from})", self.leaf(scope, ty), self.dice.pick(&["min", "max"]))
            }
        }
    }
}
