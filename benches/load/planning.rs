//! What planning costs: texts that have been seen before, and 4 KB of text that nobody has seen.
//!
//! Measured on weir's own [`Statements`], in this process, on one thread, without any server, in processor time: from the
//! text of a statement to its bound plan, once for a database of one server and once for one of two shards, where every
//! statement must be parsed. A text is made unknown again by a new version of the [`View`], as after DDL. The baselines are
//! the lexer, which every text has to pass, and for unknown texts the parser alone.

use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use weir::database::View;
use weir::statements::{Said, Scratch, Statements};
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::plan::Values;
use weir_core::session::vars::Reading;
use weir_core::sql::lex::{Token, lex};
use weir_core::topology::catalog::{Catalog, Column, DefaultKind, Overload, Relation, RelationKind, Volatility};
use weir_core::topology::{KeyType, Placement, SlotMap, TableRules, Topology};

use crate::cost::thread_cpu;

/// Length of the texts that count as long.
const LONG_BYTES: usize = 4 * 1024;

/// What is planned, and how it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sight {
    /// The same text again.
    Seen,
    /// The text was seen with other literals.
    SeenShape,
    /// A Parse message of a text that is known.
    SeenParse,
    Unknown,
}

impl Sight {
    pub fn name(self) -> &'static str {
        match self {
            Sight::Seen => "seen before",
            Sight::SeenShape => "seen with other literals",
            Sight::SeenParse => "seen before, Parse message",
            Sight::Unknown => "unknown",
        }
    }
}

/// One text's figures: mean processor time in microseconds.
#[derive(Clone, Debug)]
pub struct PlanSample {
    pub text: &'static str,
    pub bytes: usize,
    pub sight: Sight,
    /// Text → bound plan, where there is one server and neither replica nor cache.
    pub alone_us: f64,
    /// Text → bound plan, where there are two shards.
    pub sharded_us: f64,
    /// Cutting the same text into tokens, nothing more.
    pub lex_us: f64,
    /// sqlparser alone, from the text to its tree, where planning needs one.
    pub parser_us: Option<f64>,
}

/// Plans every text for about `each` time.
pub fn run(each: Duration) -> Vec<PlanSample> {
    let mut planners = [Planner::new(1), Planner::new(2)];
    let mut samples = Vec::new();
    for (name, texts) in repeated() {
        for sight in [Sight::Seen, Sight::SeenShape, Sight::SeenParse] {
            let [alone_us, sharded_us] = planners.each_mut().map(|planner| planner.seen_us(&texts, sight, each));
            let (bytes, lex_us) = (texts[0].len(), lex_us(&texts[0], each));
            samples.push(PlanSample { text: name, bytes, sight, alone_us, sharded_us, lex_us, parser_us: None });
        }
    }
    for (name, text) in unknown() {
        let [alone_us, sharded_us] = planners.each_mut().map(|planner| planner.unknown_us(&text, each));
        let (bytes, lex_us, parser_us) = (text.len(), lex_us(&text, each), Some(parser_us(&text, each)));
        let sight = Sight::Unknown;
        samples.push(PlanSample { text: name, bytes, sight, alone_us, sharded_us, lex_us, parser_us });
    }
    samples
}

struct Planner {
    statements: Statements,
    view: View,
    scratch: Scratch,
}

impl Planner {
    fn new(shards: u16) -> Planner {
        let statements = if shards == 1 { Statements::new().for_one_server() } else { Statements::new() };
        Planner { statements, view: view(shards), scratch: Scratch::default() }
    }

    /// `texts` differ in their literals only.
    fn seen_us(&mut self, texts: &[String], sight: Sight, each: Duration) -> f64 {
        let parse = Bytes::copy_from_slice(texts[0].as_bytes());
        let types = Bytes::new();
        let mut turn = 0;
        mean_us(each, 1000, || match sight {
            Sight::SeenParse => {
                let said = Said { sql: &parse, types: &types, reading: Reading::default() };
                black_box(self.statements.prepare(said, &self.view, &mut self.scratch).id);
            }
            _ => {
                turn += usize::from(sight == Sight::SeenShape);
                self.plan(&texts[turn % texts.len()]);
            }
        })
    }

    fn unknown_us(&mut self, text: &str, each: Duration) -> f64 {
        mean_us(each, 10, || {
            self.view.version += 1;
            self.plan(text);
        })
    }

    /// As a session does for a simple query of one statement.
    fn plan(&mut self, text: &str) {
        let known = self.statements.recall(text, &self.view, &mut self.scratch);
        let understood = known.unwrap_or_else(|| {
            let understood = self.statements.understand(text, &self.view, &mut self.scratch);
            self.statements.remember(text, &self.view, &understood, &self.scratch);
            understood
        });
        let values = Values { params: &[], sql: text, literals: &self.scratch.normal.literals };
        // Some of the texts are refused; that is an answer too.
        let _ = black_box(understood.template.bind(&values, &self.view.topology));
    }
}

fn lex_us(text: &str, each: Duration) -> f64 {
    let mut tokens: Vec<Token> = Vec::new();
    mean_us(each / 2, 100, || {
        let _ = black_box(lex(text, &mut tokens));
    })
}

fn parser_us(text: &str, each: Duration) -> f64 {
    mean_us(each / 2, 10, || {
        let _ = black_box(Parser::parse_sql(&PostgreSqlDialect {}, text));
    })
}

/// Mean processor time of one call, in microseconds; the clock is read every `batch` calls.
fn mean_us(each: Duration, batch: usize, mut call: impl FnMut()) -> f64 {
    (0..batch).for_each(|_| call());
    let (mut calls, began) = (0, thread_cpu());
    loop {
        (0..batch).for_each(|_| call());
        calls += batch;
        let took = thread_cpu().saturating_sub(began);
        if took >= each {
            return took.as_secs_f64() * 1e6 / calls as f64;
        }
    }
}

/// Statements that applications repeat, each with more sets of literals than are remembered as whole texts.
fn repeated() -> Vec<(&'static str, Vec<String>)> {
    let with = |text: &str| (10_000..14_000).map(|key| text.replace('#', &key.to_string())).collect();
    vec![
        ("pgbench -S", with("SELECT abalance FROM accounts WHERE aid = #;")),
        (
            "join on the key",
            with(
                "SELECT o.order_id, o.status, i.name, i.qty * i.price AS sum FROM orders o JOIN items i USING (user_id, \
                 order_id) WHERE o.user_id = # AND o.status IN ('paid', 'sent') ORDER BY o.created_at DESC LIMIT 20",
            ),
        ),
        ("report, 4 KB", with(&report("WHERE o.user_id = #"))),
    ]
}

/// Long texts: what applications send, and what someone sends who knows how parsers work.
fn unknown() -> Vec<(&'static str, String)> {
    let filled = |head: &str, piece: &str, tail: &str| {
        let pieces = (LONG_BYTES - head.len() - tail.len()) / piece.len();
        format!("{head}{}{tail}", piece.repeat(pieces))
    };
    let nested = |head: &str, open: &str, middle: &str, close: &str| {
        let deep = (LONG_BYTES - head.len() - middle.len()) / (open.len() + close.len());
        format!("{head}{}{middle}{}", open.repeat(deep), close.repeat(deep))
    };
    let list = |items: usize| (0..items).map(|n| (n * 7919).to_string()).collect::<Vec<_>>().join(", ");
    let row = |n: usize| format!("(7, {n}, 'name of item {n}', {n}.25)");
    let rows = |count: usize| (0..count).map(row).collect::<Vec<_>>().join(", ");
    vec![
        ("report with joins", report("WHERE o.user_id = 4711")),
        ("report without a key", report("")),
        ("IN list of 500", format!("SELECT * FROM orders WHERE user_id IN ({})", list(500))),
        ("INSERT of 100 rows", format!("INSERT INTO items (user_id, order_id, name, price) VALUES {}", rows(100))),
        ("parentheses in an expression", nested("SELECT ", "(", "1", ")")),
        ("parentheses in FROM", nested("SELECT * FROM ", "(", "orders", ")")),
        ("180 parentheses in FROM", format!("SELECT * FROM {}orders{}", "(".repeat(180), ")".repeat(180))),
        ("40 parentheses in FROM", format!("SELECT * FROM {}orders{}", "(".repeat(40), ")".repeat(40))),
        ("40 parentheses", format!("SELECT {}1{} FROM orders", "(".repeat(40), ")".repeat(40))),
        ("20 nested sub-queries", format!("SELECT * FROM {}orders{}", "(SELECT * FROM ".repeat(20), ") a".repeat(20))),
        ("unclosed parentheses", filled("SELECT ", "(", "")),
        ("nested CASE", nested("SELECT ", "CASE WHEN a THEN ", "1", " END")),
        ("operators", filled("SELECT 1", "+1", "")),
        ("unary operators", filled("SELECT ", "- ", "1")),
        ("AND of conditions", filled("SELECT * FROM orders WHERE user_id=1", " AND a=1", "")),
        ("OR of conditions", filled("SELECT * FROM orders WHERE user_id=1", " OR a=1", "")),
        ("NOT", filled("SELECT ", "NOT ", "true")),
        ("casts", filled("SELECT 1", "::int", "")),
        ("subscripts", filled("SELECT a", "[1]", "")),
        ("function calls", nested("SELECT ", "f(", "1", ")")),
        ("40 function calls", format!("SELECT {}1{} FROM orders", "abs(".repeat(40), ")".repeat(40))),
        ("UNIONs", filled("SELECT 1", " UNION SELECT 1", "")),
        ("columns", filled("SELECT a", ",a", " FROM orders")),
        ("tables", filled("SELECT 1 FROM orders", ",orders", "")),
        ("joins", filled("SELECT 1 FROM orders a", " JOIN orders USING(user_id)", "")),
        ("WITH queries", filled("WITH a AS (SELECT 1)", ",a AS (SELECT 1)", " SELECT 1")),
        ("words", filled("SELECT", " a", "")),
        ("nested comments", nested("SELECT ", "/*", "", "*/") + " 1"),
        ("dollar quotes", filled("SELECT ", "$a$,$a$,", "1")),
        ("open dollar quotes", filled("SELECT ", "$a$ $b$ $", "")),
        ("quotes", filled("SELECT ", "'',", "1")),
        ("a long string", filled("SELECT '", "x", "'")),
        ("statements", filled("", "a;", "")),
    ]
}

/// 4 KB of what reporting tools write.
fn report(condition: &str) -> String {
    let mut text = "SELECT o.user_id, o.status".to_owned();
    for column in 0..40 {
        let _ = write!(
            text,
            ",\n  sum(CASE WHEN o.status = 's{column}' AND i.qty > {column} THEN i.qty * i.price ELSE 0 END) AS sum_{column}"
        );
        if text.len() > LONG_BYTES - 250 {
            break;
        }
    }
    let _ = write!(
        text,
        "\nFROM orders o JOIN items i ON i.user_id = o.user_id AND i.order_id = o.order_id\n{condition}\nGROUP BY o.user_id, o.status"
    );
    text
}

/// Three sharded tables.
fn view(shards: u16) -> View {
    /// Name, shard key, columns with their types.
    type Table = (&'static str, &'static str, &'static [(&'static str, u32)]);
    const TABLES: [Table; 3] = [
        ("accounts", "aid", &[("aid", 23), ("bid", 23), ("abalance", 23), ("filler", 1042)]),
        ("orders", "user_id", &[("user_id", 20), ("order_id", 20), ("status", 25), ("created_at", 1184), ("a", 23)]),
        ("items", "user_id", &[("user_id", 20), ("order_id", 20), ("name", 25), ("qty", 20), ("price", 20)]),
    ];
    let mut rules = TableRules::default();
    let mut catalog = Catalog { version: 1, ..Catalog::default() };
    let public = catalog.relations.entry("public".into()).or_default();
    for (table, key, columns) in TABLES {
        rules.insert("public", table, Placement::Sharded { key: key.into(), key_type: KeyType::Int });
        let column = |(name, type_oid): &(&str, u32)| Column {
            name: (*name).into(),
            type_oid: *type_oid,
            byte_order: !matches!(type_oid, 25 | 1042),
            not_null: false,
            default: DefaultKind::None,
        };
        let relation = Relation {
            kind: RelationKind::PlainTable,
            columns: columns.iter().map(column).collect(),
            writes_spread: false,
            referenced: false,
            unique_columns: Vec::new(),
            reads: Vec::new(),
            triggers: Vec::new(),
        };
        public.insert(table.into(), relation);
    }
    for function in ["sum", "abs", "f"] {
        let overload = Overload { least_arguments: 1, most_arguments: 1, volatility: Volatility::Immutable };
        catalog.builtin_functions.insert(function.into(), vec![overload]);
    }
    catalog.aggregates.insert("sum".into());
    let owners = (0..Slot::COUNT).map(|slot| ShardId(slot as u16 % shards)).collect();
    let rules = Arc::new(rules);
    let topology = Topology {
        epoch: Epoch(1),
        roster: weir_core::topology::Roster::fixed(usize::from(shards)),
        shards: (0..shards).map(|shard| format!("shard{shard}").into()).collect(),
        slots: SlotMap::new(owners).unwrap_or_else(|| SlotMap::single(ShardId(0))),
        tables: Arc::clone(&rules),
        home: ShardId(0),
        moves: weir_core::topology::moves::Moves::default(),
    };
    let (catalog, width) = (Arc::new(catalog), topology.width());
    View { version: 1, topology, rules, catalog, search_path: vec!["public".into()], width, apart: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_are_as_long_as_they_say() {
        for (name, text) in unknown() {
            assert!(text.len() <= LONG_BYTES + 300, "{name}: {} bytes", text.len());
        }
        for (name, texts) in repeated() {
            assert_ne!(texts[0], texts[1], "{name}");
        }
    }

    #[test]
    fn reports_are_planned_and_not_given_up() {
        let mut planner = Planner::new(2);
        for text in [report("WHERE o.user_id = 4711"), report("")] {
            let understood = planner.statements.understand(&text, &planner.view, &mut planner.scratch);
            let values = Values { params: &[], sql: &text, literals: &planner.scratch.normal.literals };
            let plan = understood.template.bind(&values, &planner.view.topology);
            assert!(plan.is_ok(), "{:?}", plan.err());
        }
    }
}
