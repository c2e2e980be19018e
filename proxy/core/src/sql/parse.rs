//! From SQL text to [`Facts`]: the only place that uses sqlparser.
//!
//! Invariant: text reaches the parser only after our own lexer has cut it and bounded its size and depth, because a deep
//! tree can overflow the stack, and after the spellings the parser is known to read wrongly were turned away. What is
//! not certain ends as [`Unparsed`]; nothing here ever prints SQL.
//!
//! Non-goals: deciding where a statement goes, and statements other than SELECT, INSERT, UPDATE and DELETE.

mod analyse;
mod block;
mod defaults;
mod dml;
mod env;
mod feed;
mod formula;
mod from;
mod many;
mod scope;
mod shape;
mod sites;
mod terms;

use std::collections::HashMap;
use std::ops::ControlFlow;

use sqlparser::ast::{
    Expr, FunctionArg, FunctionArgExpr, FunctionArguments, Query, SetExpr, Statement, TableFactor, Visit, Visitor,
};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;

use super::facts::{Facts, FunctionName, Instance, KeySetting, Schema, Spread, Use, Verb};
use super::lex::{Token, TokenKind, lex};
use super::rows::Rows;
use crate::topology::Placement;
use analyse::Analyser;
pub use analyse::Unparsed;
use scope::{Scope, name_parts};
pub use sites::{Site, sites};

/// Longer text is not parsed.
const PARSED_BYTES_MAX: usize = 32 * 1024;
/// Deeper nesting of parentheses is not parsed.
const DEPTH_MAX: u16 = 200;
/// More operators make the tree too deep to drop safely.
const OPERATORS_MAX: usize = 2_000;

/// More relations than this are not compared with each other.
const INSTANCES_MAX: usize = 100;

/// Words that put one more expression or query around what stands before (or, with NOT, behind) them.
const CHAINING: &[&str] = &[
    "and",
    "at",
    "between",
    "collate",
    "except",
    "ilike",
    "in",
    "intersect",
    "is",
    "isnull",
    "like",
    "not",
    "notnull",
    "or",
    "similar",
    "union",
];

/// Learns what is certain of one SELECT, INSERT, UPDATE or DELETE (or WITH …). `text` must have been cut into `tokens`;
/// `params` is the highest `$n` the client wrote, higher ones are lifted literals.
pub fn facts(text: &str, tokens: &[Token], params: u16, schema: &Schema<'_>) -> Result<Facts, Unparsed> {
    let rows = Rows::find(text, tokens);
    // The parser does not know OVERRIDING, which changes nothing of what is learnt here.
    if let Some(overriding) = rows.as_ref().and_then(|rows| rows.overriding.clone()) {
        let mut plain = text.to_owned();
        plain.replace_range(tokens[overriding.start].start as usize..tokens[overriding.end - 1].end as usize, "");
        let mut plain_tokens = Vec::new();
        lex(&plain, &mut plain_tokens).map_err(|_| Unparsed("weir cannot cut it into words"))?;
        return facts(&plain, &plain_tokens, params, schema);
    }
    if let Some(rows) = &rows
        && let Some(short) = many::shortened(text, tokens, rows)
    {
        let mut short_tokens = Vec::new();
        lex(&short, &mut short_tokens).map_err(|_| Unparsed("weir cannot cut it into words"))?;
        return parsed(&short, &short_tokens, params, schema, Some((text, tokens, rows)));
    }
    parsed(text, tokens, params, schema, None)
}

/// `whole`: the statement that this one is the first row of.
fn parsed(
    text: &str,
    tokens: &[Token],
    params: u16,
    schema: &Schema<'_>,
    whole: Option<(&str, &[Token], &Rows)>,
) -> Result<Facts, Unparsed> {
    guard(text, tokens)?;
    let dialect = PostgreSqlDialect {};
    let parsed = match feed::parser_tokens(text, tokens) {
        Some(tokens) => Parser::new(&dialect).with_tokens(tokens).parse_statements(),
        None => Parser::parse_sql(&dialect, text),
    };
    let mut statements = parsed.map_err(|_| Unparsed("weir's parser does not know its syntax"))?;
    let (Some(statement), true) = (statements.pop(), statements.is_empty()) else {
        return Err(Unparsed("it is not exactly one statement"));
    };
    let mut analyser = Analyser::new(schema, params);
    analyser.statement(&statement, &Scope::default(), &env::Env::default())?;
    if analyser.instances.len() > INSTANCES_MAX {
        return Err(Unparsed("it names more than 100 relations"));
    }
    let verb = verb(&statement)?;
    let mut survey = Survey::default();
    let _ = statement.visit(&mut survey);
    if survey.unnamed {
        return Err(Unparsed("it has a computed name"));
    }
    let mut functions = survey.functions;
    functions.sort();
    functions.dedup();
    let mut instances = instances(&analyser);
    if let Some((text, tokens, rows)) = whole {
        all_keys(&mut analyser, &mut instances, (text, tokens, rows));
    }
    let limited_subquery = analyser.limited.iter().any(|range| {
        instances[range.clone()]
            .iter()
            .any(|instance| !matches!(schema.placement(&instance.table), Placement::Sharded { .. }))
    });
    Ok(Facts {
        verb,
        functions,
        locks_rows: survey.locks,
        writes_in_with: analyser.writes_in_with,
        with: analyser.with,
        limited_subquery,
        server_bound: survey.sampled || mentions_system_columns(text, tokens),
        unspreadable: analyser.unspreadable,
        ambiguous_params: ambiguous(&analyser, whole.map_or(tokens, |(_, tokens, _)| tokens)),
        key_setting: analyser.key_setting.clone(),
        differing_defaults: std::mem::take(&mut analyser.differing_defaults),
        updates_conflicts: analyser.updates_conflicts,
        select: analyser.select.take(),
        instances,
    })
}

fn instances(analyser: &Analyser<'_>) -> Vec<Instance> {
    let core = analyser.core_nodes();
    let one = |(index, draft): (usize, &analyse::InstanceDraft)| {
        let sharded = matches!(analyser.schema.placement(&draft.table), Placement::Sharded { .. });
        Instance {
            table: draft.table.clone(),
            usage: draft.usage,
            keys: if sharded { analyser.keys_of(index) } else { None },
            spread: match &core {
                Some(core) if sharded => analyser.spread_of(index, core),
                _ => Spread::Free,
            },
            top: draft.top,
        }
    };
    analyser.instances.iter().enumerate().map(one).collect()
}

/// The keys of all rows, where only the first was parsed.
fn all_keys(analyser: &mut Analyser<'_>, instances: &mut [Instance], (text, tokens, rows): (&str, &[Token], &Rows)) {
    let Some(insert) = instances.iter_mut().find(|instance| instance.usage == Use::Insert) else { return };
    let (Some(keys), Some(position)) = (&mut insert.keys, analyser.key_position) else { return };
    let Placement::Sharded { key_type, .. } = analyser.schema.placement(&insert.table) else { return };
    let constants: Option<Vec<_>> = (1..rows.rows.len())
        .map(|row| many::constant(text, tokens, rows.values_of(row, tokens).into_iter().nth(position)?))
        .collect();
    match constants.and_then(|constants| analyser.key_set(constants, *key_type)) {
        Some(others) => keys.terms.extend(others.terms),
        None => {
            insert.keys = None;
            analyser.key_setting = KeySetting::Computed;
        }
    }
}

/// Parameters that are a key and something else too: the server may have given them another type than the key's.
fn ambiguous(analyser: &Analyser<'_>, tokens: &[Token]) -> Vec<u16> {
    if analyser.key_uses.keys().all(|number| *number > analyser.params) {
        return Vec::new();
    }
    let mut written: HashMap<u16, usize> = HashMap::new();
    for token in tokens {
        if let TokenKind::Param(number) = token.kind {
            *written.entry(number).or_default() += 1;
        }
    }
    let mut found: Vec<u16> = analyser
        .key_uses
        .iter()
        .filter(|(number, uses)| {
            **number <= analyser.params && written.get(*number).is_some_and(|written| written > *uses)
        })
        .map(|(number, _)| *number)
        .collect();
    found.sort_unstable();
    found
}

fn verb(statement: &Statement) -> Result<Verb, Unparsed> {
    match statement {
        Statement::Insert(_) => Ok(Verb::Insert),
        Statement::Update(_) => Ok(Verb::Update),
        Statement::Delete(_) => Ok(Verb::Delete),
        Statement::Query(query) => match &*query.body {
            SetExpr::Insert(inner) | SetExpr::Update(inner) | SetExpr::Delete(inner) => verb(inner),
            _ => Ok(Verb::Select),
        },
        _ => Err(Unparsed("this kind of statement is not analysed")),
    }
}

/// Turns away what is too large for the parser and what it reads wrongly (DESIGN.md §4).
fn guard(text: &str, tokens: &[Token]) -> Result<(), Unparsed> {
    if text.len() > PARSED_BYTES_MAX {
        return Err(Unparsed("it is longer than 32 KiB"));
    }
    let mut operators = 0;
    for (index, token) in tokens.iter().enumerate() {
        if token.depth > DEPTH_MAX {
            return Err(Unparsed("it is nested too deeply"));
        }
        let before = index.checked_sub(1).map(|index| tokens[index]);
        match token.kind {
            TokenKind::Operator | TokenKind::Cast | TokenKind::LeftBracket => operators += 1,
            TokenKind::Word => {
                let word = token.text(text);
                operators += usize::from(CHAINING.iter().any(|chaining| word.eq_ignore_ascii_case(chaining)));
                if word.eq_ignore_ascii_case("only") && before.is_some_and(|before| relation_follows(before, text)) {
                    return Err(Unparsed("it says ONLY, which changes what is read"));
                }
                if word.eq_ignore_ascii_case("table")
                    && before.is_none_or(|before| before.kind == TokenKind::Word || before.kind == TokenKind::LeftParen)
                {
                    return Err(Unparsed("it says TABLE where weir's parser would overlook it"));
                }
            }
            TokenKind::Integer if token.text(text).bytes().any(|byte| byte.is_ascii_alphabetic() || byte == b'_') => {
                return Err(Unparsed("it has a number that is not decimal"));
            }
            TokenKind::String if before.is_some_and(|before| !string_may_follow(before, text)) => {
                return Err(Unparsed("it has a literal of a type weir does not know"));
            }
            TokenKind::UnicodeString | TokenKind::BitString | TokenKind::EscapeString
                if before.is_some_and(|before| {
                    matches!(before.kind, TokenKind::Word | TokenKind::QuotedWord) && !string_may_follow(before, text)
                }) =>
            {
                return Err(Unparsed("it has a literal of a type weir does not know"));
            }
            _ => {}
        }
    }
    if operators > OPERATORS_MAX { Err(Unparsed("it has too many operators")) } else { Ok(()) }
}

/// After these words (or a comma) stands a relation.
fn relation_follows(before: Token, text: &str) -> bool {
    before.kind == TokenKind::Comma
        || ["from", "update", "into", "join", "using"].iter().any(|word| before.is_word(text, word))
}

/// May a quoted string follow this token as a value, in a way the parser reads as Postgres does?
fn string_may_follow(before: Token, text: &str) -> bool {
    const WORDS: &[&str] = &[
        "and",
        "as",
        "between",
        "bigint",
        "boolean",
        "by",
        "bytea",
        "case",
        "date",
        "distinct",
        "else",
        "escape",
        "from",
        "ilike",
        "in",
        "int",
        "integer",
        "interval",
        "json",
        "jsonb",
        "like",
        "limit",
        "not",
        "numeric",
        "offset",
        "on",
        "or",
        "returning",
        "select",
        "set",
        "similar",
        "smallint",
        "text",
        "then",
        "time",
        "timestamp",
        "timestamptz",
        "to",
        "uuid",
        "values",
        "when",
        "where",
        "zone",
    ];
    match before.kind {
        TokenKind::Word => WORDS.contains(&before.text(text).to_ascii_lowercase().as_str()),
        TokenKind::QuotedWord | TokenKind::RightParen | TokenKind::RightBracket => false,
        _ => true,
    }
}

/// ctid, xmin and the like differ between servers that hold the same rows.
fn mentions_system_columns(text: &str, tokens: &[Token]) -> bool {
    const NAMES: &[&str] = &["ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"];
    tokens.iter().any(|token| {
        matches!(token.kind, TokenKind::Word | TokenKind::QuotedWord)
            && NAMES.iter().any(|name| token.text(text).trim_matches('"').eq_ignore_ascii_case(name))
    })
}

/// Number of the arguments of a call; `None` where named or spread ones make it unclear.
fn arguments(arguments: &FunctionArguments) -> Option<u16> {
    match arguments {
        FunctionArguments::None => Some(0),
        FunctionArguments::Subquery(_) => Some(1),
        FunctionArguments::List(list) => positional(&list.args),
    }
}

fn positional(arguments: &[FunctionArg]) -> Option<u16> {
    let plain = arguments.iter().all(|argument| matches!(argument, FunctionArg::Unnamed(FunctionArgExpr::Expr(_))));
    u16::try_from(arguments.len()).ok().filter(|_| plain)
}

/// What is true of the statement as a whole, wherever in it it stands.
#[derive(Default)]
struct Survey {
    functions: Vec<FunctionName>,
    locks: bool,
    sampled: bool,
    unnamed: bool,
}

impl Survey {
    fn call(&mut self, name: &sqlparser::ast::ObjectName, arguments: Option<u16>) {
        let Some(parts) = name_parts(name) else {
            self.unnamed = true;
            return;
        };
        let mut parts = parts.into_iter().rev();
        let Some(name) = parts.next() else { return };
        self.functions.push(FunctionName { name: name.into(), schema: parts.next().map(Into::into), arguments });
    }

    fn named(&mut self, name: &str) {
        self.functions.push(FunctionName { schema: None, name: name.into(), arguments: None });
    }

    fn builtin(&mut self, name: &str) {
        self.functions.push(FunctionName { schema: Some("pg_catalog".into()), name: name.into(), arguments: None });
    }
}

impl Visitor for Survey {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.locks |= !query.locks.is_empty();
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        match expr {
            Expr::Function(function) => self.call(&function.name, arguments(&function.args)),
            // The parser has nodes of their own for some names that a user may give to functions, too.
            Expr::Ceil { .. } => self.named("ceil"),
            Expr::Floor { .. } => self.named("floor"),
            Expr::Substring { shorthand, .. } => self.named(if *shorthand { "substr" } else { "substring" }),
            // What a user-defined conversion or an operator of another schema does is not known.
            Expr::Cast { data_type: sqlparser::ast::DataType::Custom(name, _), .. } => {
                let parts = name_parts(name).unwrap_or_default();
                if parts.last().is_some_and(|name| name.starts_with("reg")) {
                    self.builtin("to_regclass");
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { name, args, sample, .. } => {
                if let Some(args) = args {
                    self.call(name, positional(&args.args));
                }
                self.sampled |= sample.is_some();
            }
            TableFactor::Function { name, args, .. } => self.call(name, positional(args)),
            TableFactor::UNNEST { .. } => self.builtin("unnest"),
            TableFactor::Derived { sample, .. } => self.sampled |= sample.is_some(),
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::catalog::Catalog;
    use crate::topology::{TableRules, Width};

    #[test]
    fn functions_are_seen_that_the_parser_has_nodes_of_its_own_for() {
        let (rules, catalog) = (TableRules::default(), Catalog::default());
        let schema = Schema { rules: &rules, catalog: &catalog, search_path: &[], width: Width::Several };
        for (sql, name) in [
            ("SELECT ceil(a) FROM t", "ceil"),
            ("SELECT 1 + floor(a) FROM t", "floor"),
            ("SELECT substr(a, 1, 2) FROM t", "substr"),
            ("SELECT * FROM t WHERE substring(a, 1) = 'b'", "substring"),
        ] {
            let mut tokens = Vec::new();
            lex(sql, &mut tokens).expect("lexes");
            let facts = facts(sql, &tokens, 0, &schema).expect("parses");
            assert!(facts.functions.iter().any(|function| &*function.name == name), "{sql}: {:?}", facts.functions);
        }
    }
}
