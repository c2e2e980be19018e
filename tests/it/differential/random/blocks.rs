//! SELECT blocks: plain rows, DISTINCT, windows, groups and aggregates.

use super::author::{Author, Block, Relation};
use super::rows::Ty;
use super::values::KEYABLE;

const SHOWN: [Ty; 18] = [
    Ty::Small,
    Ty::Int,
    Ty::Int,
    Ty::Big,
    Ty::Big,
    Ty::Num,
    Ty::Num,
    Ty::Float,
    Ty::Text,
    Ty::Text,
    Ty::Ranked,
    Ty::Date,
    Ty::Stamp,
    Ty::Zoned,
    Ty::Uuid,
    Ty::Bool,
    Ty::Words,
    Ty::Json,
];

impl Author {
    /// A block of any kind; `outermost`: its ORDER BY may use more than its columns.
    pub fn block(&mut self, depth: u32, outermost: bool) -> Block {
        let mut block = match self.dice.roll(20) {
            0..=4 => self.grouped_block(depth),
            5..=8 => self.aggregate_block(depth),
            9 => self.sets_block(depth),
            10 | 11 => self.window_block(depth),
            12 => self.first_of_each_block(depth),
            _ => self.plain_block(depth, None),
        };
        if !outermost {
            block.sortable.clear();
        }
        block
    }

    /// Rows as FROM gives them; `types`: those its columns must have.
    pub fn plain_block(&mut self, depth: u32, types: Option<&[Ty]>) -> Block {
        let (from, scope) = self.from(depth);
        let distinct = types.is_none() && self.dice.percent(18);
        let chosen: Vec<Ty> = match types {
            Some(types) => types.to_vec(),
            None if distinct => (0..=self.dice.roll(3)).map(|_| self.dice.pick(&KEYABLE)).collect(),
            None => (0..=self.dice.roll(4)).map(|_| self.dice.pick(&SHOWN)).collect(),
        };
        if types.is_none() && !distinct && self.dice.percent(6) {
            return self.starred(from, &scope);
        }
        let before = std::mem::replace(&mut self.parameters_allowed, !distinct);
        let mut items = Vec::new();
        let mut columns = Vec::new();
        for (at, ty) in chosen.iter().enumerate() {
            let value = self.value(&scope, *ty, 2);
            let name = format!("c{}", at + 1);
            items.push(format!("{value} AS {name}"));
            columns.push((name, *ty));
        }
        self.parameters_allowed = before;
        let mut unique = Vec::new();
        if distinct {
            unique = columns.iter().map(|(name, _)| name.clone()).collect();
        } else if types.is_none()
            && self.dice.percent(40)
            && let Some(keys) = unique_of(&scope)
        {
            for key in keys {
                let name = format!("c{}", columns.len() + 1);
                let (alias, column) = key.split_once('.').unwrap_or_default();
                let relation = scope.iter().find(|relation| relation.alias == alias);
                let ty = relation
                    .and_then(|relation| relation.columns.iter().find(|(name, _)| name == column))
                    .map_or(Ty::Int, |column| column.1);
                items.push(format!("{key} AS {name}"));
                unique.push(name.clone());
                columns.push((name, ty));
            }
        }
        let filter = self.filter(&scope, 2);
        let head = if distinct { "SELECT DISTINCT" } else { "SELECT" };
        let sortable = if distinct || types.is_some() { Vec::new() } else { self.sortable(&scope) };
        Block {
            sql: format!("{head} {} FROM {from}{filter}", items.join(", ")),
            columns,
            sortable,
            unique,
            order: None,
        }
    }

    /// `SELECT t.*`
    fn starred(&mut self, from: String, scope: &[Relation]) -> Block {
        let first = &scope[0];
        let item = format!("{}.*", first.alias);
        let filter = self.filter(scope, 1);
        let (columns, alone) = (first.columns.clone(), scope.len() == 1);
        let unique = if alone { first.unique.clone() } else { Vec::new() };
        let sortable = self.sortable(scope);
        Block { sql: format!("SELECT {item} FROM {from}{filter}"), columns, sortable, unique, order: None }
    }

    fn sortable(&mut self, scope: &[Relation]) -> Vec<String> {
        let before = std::mem::replace(&mut self.parameters_allowed, false);
        let ty = self.dice.pick(&[Ty::Int, Ty::Text, Ty::Ranked, Ty::Date, Ty::Num]);
        let found = self.column(scope, ty);
        self.parameters_allowed = before;
        found.into_iter().collect()
    }

    /// An aggregate call, and what it gives.
    fn aggregate(&mut self, scope: &[Relation]) -> (String, Ty) {
        let filter =
            if self.dice.percent(14) { format!(" FILTER (WHERE {})", self.predicate(scope, 1)) } else { String::new() };
        let any = self.dice.pick(&KEYABLE);
        let number = self.dice.pick(&[Ty::Int, Ty::Int, Ty::Big, Ty::Num, Ty::Small, Ty::Float]);
        let averaged = if number == Ty::Float { Ty::Rough } else { Ty::Soft };
        let (call, ty) = match self.dice.roll(22) {
            0..=3 => ("count(*)".to_owned(), Ty::Big),
            4 => (format!("count({})", self.value(scope, any, 1)), Ty::Big),
            5 => (format!("count(DISTINCT {})", self.value(scope, any, 1)), Ty::Big),
            6..=9 => (format!("sum({})", self.value(scope, number, 1)), summed(number)),
            10 | 11 => (format!("avg({})", self.value(scope, number, 1)), averaged),
            12..=15 => {
                let ty =
                    self.dice.pick(&[Ty::Int, Ty::Big, Ty::Num, Ty::Text, Ty::Ranked, Ty::Date, Ty::Stamp, Ty::Zoned]);
                (format!("{}({})", self.dice.pick(&["min", "max"]), self.value(scope, ty, 1)), ty)
            }
            16 => {
                let name = self.dice.pick(&["bool_and", "bool_or", "every"]);
                (format!("{name}({})", self.value(scope, Ty::Bool, 1)), Ty::Bool)
            }
            17 => {
                let value = self.column(scope, Ty::Text).unwrap_or_else(|| "'x'::text".to_owned());
                (format!("string_agg({value}, ',' ORDER BY {value})"), Ty::Text)
            }
            18 => {
                let value = self.column(scope, Ty::Int).unwrap_or_else(|| "1".to_owned());
                (format!("array_agg({value} ORDER BY {value} DESC)"), Ty::Ints)
            }
            19 => (format!("sum(DISTINCT {})", self.value(scope, number, 0)), summed(number)),
            20 => (format!("{}({})", self.dice.pick(&["bit_and", "bit_or"]), self.value(scope, Ty::Int, 1)), Ty::Int),
            _ => {
                let name = self.dice.pick(&["stddev", "variance", "var_pop"]);
                self.near |= number == Ty::Float;
                (format!("{name}({})", self.value(scope, number, 0)), averaged)
            }
        };
        (call + &filter, ty)
    }

    /// An aggregate, or an expression over aggregates.
    fn over_aggregates(&mut self, scope: &[Relation]) -> (String, Ty) {
        let (call, ty) = self.aggregate(scope);
        if self.dice.percent(65) {
            return (call, ty);
        }
        match (ty, self.dice.roll(6)) {
            (Ty::Big, 0) => (format!("{call} + 1"), Ty::Big),
            (Ty::Big, 1) => (format!("({call})::int"), Ty::Int),
            (Ty::Big, 2) => (format!("{call} > 5"), Ty::Bool),
            (Ty::Big, 3) => (format!("coalesce({call}, 0)"), Ty::Big),
            (Ty::Big, 4) => (format!("{call} / nullif(count(*), 0)"), Ty::Big),
            (Ty::Big, _) => (format!("CASE WHEN count(*) > 3 THEN {call} ELSE 0 END"), Ty::Big),
            (Ty::Int | Ty::Num, 0) => (format!("{call} - 1"), ty),
            (Ty::Int, 1) => (format!("greatest({call}, 3)"), Ty::Int),
            (Ty::Int | Ty::Num | Ty::Whole, 2) => (format!("-({call})"), ty),
            (Ty::Num, 3) => (format!("coalesce({call}, 0.00)"), Ty::Num),
            (Ty::Num, 4) => (format!("{call} * 2"), Ty::Num),
            (Ty::Num | Ty::Whole, 5) => (format!("{call} / nullif(count(*), 0)"), Ty::Soft),
            (Ty::Soft, 0..=2) => (format!("round({call}, 2)"), Ty::Num),
            (Ty::Soft, 3) => (format!("coalesce({call}, 0)"), Ty::Soft),
            (Ty::Float, 0) => (format!("{call} + 1"), Ty::Float),
            (Ty::Float | Ty::Rough, 1) => (format!("{call} / nullif(count(*), 0)"), Ty::Rough),
            (Ty::Float, 2) => (format!("coalesce({call}, 0)"), Ty::Float),
            (Ty::Text, 0..=2) => (format!("coalesce({call}, '-')"), Ty::Text),
            (Ty::Date, 0) => (format!("{call} + 1"), Ty::Date),
            (Ty::Bool, 0) => (format!("NOT {call}"), Ty::Bool),
            _ => (call, ty),
        }
    }

    /// Aggregates over everything.
    fn aggregate_block(&mut self, depth: u32) -> Block {
        let (from, scope) = self.from(depth);
        let filter = self.filter(&scope, 2);
        let (mut items, mut columns) = (Vec::new(), Vec::new());
        for at in 0..=self.dice.roll(4) {
            let (call, ty) = self.over_aggregates(&scope);
            items.push(format!("{call} AS c{}", at + 1));
            columns.push((format!("c{}", at + 1), ty));
        }
        let having = self.having(&scope, 15);
        let sql = format!("SELECT {} FROM {from}{filter}{having}", items.join(", "));
        Block { sql, columns, sortable: Vec::new(), unique: vec!["c1".to_owned()], order: None }
    }

    fn having(&mut self, scope: &[Relation], chance: usize) -> String {
        if !self.dice.percent(chance) {
            return String::new();
        }
        let (call, ty) = self.aggregate(scope);
        let condition = match ty {
            Ty::Big | Ty::Int | Ty::Num | Ty::Whole | Ty::Soft => {
                format!("{call} {} {}", self.dice.pick(&[">", "<=", "<>"]), self.dice.roll(6))
            }
            _ => format!("count(*) {} {}", self.dice.pick(&[">", ">=", "<"]), 1 + self.dice.roll(4)),
        };
        let second = self.dice.percent(20).then(|| " AND count(*) < 40".to_owned());
        format!(" HAVING {condition}{}", second.unwrap_or_default())
    }

    /// Group keys, each with its type.
    fn keys(&mut self, scope: &[Relation], count: usize) -> Vec<(String, Ty)> {
        let before = std::mem::replace(&mut self.parameters_allowed, false);
        let subqueries = std::mem::replace(&mut self.subqueries, 0);
        let mut keys: Vec<(String, Ty)> = Vec::new();
        for _ in 0..count {
            let ty = self.dice.pick(&KEYABLE);
            let cid = self.client(scope);
            let key = match (self.dice.roll(4), cid) {
                (0, Some(cid)) => (cid, Ty::Big),
                (1, _) => (self.value(scope, ty, 1), ty),
                _ => match self.column(scope, ty) {
                    Some(column) => (column, ty),
                    None => continue,
                },
            };
            // A constant in GROUP BY is a position.
            if key.0.contains('.') && !keys.contains(&key) {
                keys.push(key);
            }
        }
        (self.parameters_allowed, self.subqueries) = (before, subqueries);
        keys
    }

    fn grouped_block(&mut self, depth: u32) -> Block {
        let (from, scope) = self.from(depth);
        let filter = self.filter(&scope, 2);
        let count = 1 + self.dice.roll(2);
        let keys = self.keys(&scope, count);
        if keys.is_empty() {
            return self.aggregate_block(depth);
        }
        let (mut items, mut columns, mut grouping) = (Vec::new(), Vec::new(), Vec::new());
        for (key, ty) in &keys {
            let name = format!("c{}", columns.len() + 1);
            grouping.push(match self.dice.roll(5) {
                0 => name.clone(),
                1 => (columns.len() + 1).to_string(),
                _ => key.clone(),
            });
            items.push(format!("{key} AS {name}"));
            columns.push((name, *ty));
        }
        let unique = columns.iter().map(|(name, _)| name.clone()).collect();
        for _ in 0..=self.dice.roll(3) {
            let (call, ty) = self.over_aggregates(&scope);
            let name = format!("c{}", columns.len() + 1);
            items.push(format!("{call} AS {name}"));
            columns.push((name, ty));
        }
        let having = self.having(&scope, 20);
        let sql = format!("SELECT {} FROM {from}{filter} GROUP BY {}{having}", items.join(", "), grouping.join(", "));
        let sortable = keys.into_iter().map(|key| key.0).chain(["count(*)".to_owned()]).collect();
        Block { sql, columns, sortable, unique, order: None }
    }

    /// GROUPING SETS and its like over one relation: where two keys are joined as equal, Postgres before 18 drops one from ORDER BY
    /// although a grouping set makes one of them null.
    fn sets_block(&mut self, depth: u32) -> Block {
        let (from, scope) = self.from(depth);
        if scope.len() > 1 {
            return self.aggregate_block(depth);
        }
        let filter = self.filter(&scope, 1);
        let mut keys = self.keys(&scope, 3);
        // What is decided before it runs may leave two keys that are the same column, or a constant, which ORDER BY drops alike.
        keys.retain(|key| {
            !key.0.contains("CASE") && scope.iter().any(|one| key.0.contains(&format!("{}.", one.alias)))
        });
        let [(first, first_type), (second, second_type), ..] = keys.as_slice() else {
            return self.aggregate_block(depth);
        };
        let (call, ty) = self.aggregate(&scope);
        let sets = match self.dice.roll(3) {
            0 => format!("ROLLUP ({first}, {second})"),
            1 => format!("CUBE ({first}, {second})"),
            _ => format!("GROUPING SETS (({first}), ({second}), ())"),
        };
        let items = format!("{first} AS c1, {second} AS c2, {call} AS c3, grouping({first}, {second}) AS c4");
        let columns = [("c1", *first_type), ("c2", *second_type), ("c3", ty), ("c4", Ty::Int)];
        Block {
            sql: format!("SELECT {items} FROM {from}{filter} GROUP BY {sets}"),
            columns: columns.map(|(name, ty)| (name.to_owned(), ty)).to_vec(),
            sortable: Vec::new(),
            unique: Vec::new(),
            order: None,
        }
    }

    /// Window functions; those that depend on the order of rows have one without ties.
    fn window_block(&mut self, depth: u32) -> Block {
        let (from, scope) = self.from(depth.min(1));
        let Some(keys) = unique_of(&scope) else { return self.plain_block(depth, None) };
        let total = keys.join(", ");
        let filter = self.filter(&scope, 1);
        let ty = self.dice.pick(&[Ty::Int, Ty::Text, Ty::Ranked, Ty::Date, Ty::Bool]);
        let by = self.column(&scope, ty).unwrap_or_else(|| keys[0].clone());
        let partition = if self.dice.percent(60) { format!("PARTITION BY {by} ") } else { String::new() };
        let number = self.column(&scope, Ty::Int).unwrap_or_else(|| "1".to_owned());
        let (call, ty) = match self.dice.roll(9) {
            0 | 1 => (format!("row_number() OVER ({partition}ORDER BY {total})"), Ty::Big),
            2 => (format!("rank() OVER ({partition}ORDER BY {number} DESC)"), Ty::Big),
            3 => (format!("dense_rank() OVER (ORDER BY {by})"), Ty::Big),
            4 => (format!("sum({number}) OVER ({partition}ORDER BY {total})"), Ty::Big),
            5 => (format!("lag({number}) OVER ({partition}ORDER BY {total})"), Ty::Int),
            6 => (format!("count(*) OVER ({partition})"), Ty::Big),
            7 => (
                format!("max({number}) OVER ({partition}ORDER BY {total} ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)"),
                Ty::Int,
            ),
            _ => (format!("first_value({number}) OVER ({partition}ORDER BY {total})"), Ty::Int),
        };
        let shown = self.dice.pick(&KEYABLE);
        let value = self.value(&scope, shown, 1);
        Block {
            sql: format!("SELECT {value} AS c1, {call} AS c2 FROM {from}{filter}"),
            columns: vec![("c1".to_owned(), shown), ("c2".to_owned(), ty)],
            sortable: Vec::new(),
            unique: Vec::new(),
            order: None,
        }
    }

    /// DISTINCT ON, with the order that decides.
    fn first_of_each_block(&mut self, depth: u32) -> Block {
        let (from, scope) = self.from(depth.min(1));
        let Some(unique) = unique_of(&scope) else { return self.plain_block(depth, None) };
        let ty = self.dice.pick(&[Ty::Text, Ty::Int, Ty::Big, Ty::Ranked]);
        let Some(on) = self.column(&scope, ty) else { return self.plain_block(depth, None) };
        let filter = self.filter(&scope, 1);
        let shown = self.dice.pick(&KEYABLE);
        let value = self.value(&scope, shown, 1);
        Block {
            sql: format!("SELECT DISTINCT ON ({on}) {on} AS c1, {value} AS c2 FROM {from}{filter}"),
            columns: vec![("c1".to_owned(), ty), ("c2".to_owned(), shown)],
            sortable: Vec::new(),
            unique: vec!["c1".to_owned()],
            order: Some(format!("{on}, {}", unique.join(", "))),
        }
    }
}

fn summed(ty: Ty) -> Ty {
    match ty {
        Ty::Big => Ty::Whole,
        Ty::Num => Ty::Num,
        Ty::Float => Ty::Float,
        _ => Ty::Big,
    }
}

/// Columns that no two joined rows have alike, if that is known of every relation.
fn unique_of(scope: &[Relation]) -> Option<Vec<String>> {
    let mut all = Vec::new();
    for relation in scope {
        if relation.unique.is_empty() {
            return None;
        }
        all.extend(relation.unique.iter().map(|column| format!("{}.{column}", relation.alias)));
    }
    Some(all)
}
