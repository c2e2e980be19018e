//! MERGE over several shards: looked at as the statements it does the work of.
//!
//! What matches is an UPDATE or DELETE of the target joined with the source; what does not is an INSERT of a query of the source. If the
//! first can run on every shard for itself, then source rows meet all the target rows of their keys there; if the second keeps every
//! row on the shard it is read from, then no other shard would insert it too. The statement's own text is sent.
//! Non-goals: sources whose rows have to be carried to the shards of their keys.

use std::ops::Range;

use super::super::bind::{Route, Shape};
use super::super::rewrite::slice;
use super::super::{Access, NoCacheReason};
use super::parts::together;
use super::{Compiler, Source};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::rows::split;
use crate::sql::word;

/// Where the parts of `MERGE INTO target USING source ON condition WHEN …` stand.
pub struct Merge {
    /// The table's name with its alias, as written.
    pub target: Range<usize>,
    pub name: Range<usize>,
    pub source: Range<usize>,
    pub condition: Range<usize>,
    clauses: Vec<Clause>,
}

struct Clause {
    /// Behind AND.
    predicate: Range<usize>,
    action: Action,
}

enum Action {
    /// What stands behind SET.
    Update(Range<usize>),
    Delete,
    Insert {
        /// With its parentheses, or nothing.
        columns: Range<usize>,
        /// What stands between the parentheses of VALUES.
        values: Range<usize>,
    },
    Nothing,
}

/// A source that is one row of constants: its name, and which text each of its columns stands for.
struct Constants {
    name: String,
    columns: Vec<(String, String)>,
}

impl Compiler<'_> {
    /// MERGE over several shards.
    pub(super) fn upsert(&mut self, source: Source<'_>) -> Shape {
        let why = "weir cannot tell that its source stays with the rows of its target by their shard keys";
        self.merged(source).unwrap_or_else(|| self.unparsed(source, why))
    }

    /// The plan of a MERGE; `None`: it is not of the kind that can be taken apart, or must not be spread.
    fn merged(&mut self, source: Source<'_>) -> Option<Shape> {
        let merge = Merge::find(source.text, source.tokens)?;
        let constants = Constants::find(source, &merge.source);
        let text = |range: &Range<usize>| match &constants {
            Some(constants) => constants.put(source, range),
            None => slice(source.text, source.tokens, range).to_owned(),
        };
        let (target, from) = (text(&merge.target), slice(source.text, source.tokens, &merge.source));
        let predicates = merge.clauses.iter().filter(|clause| !clause.predicate.is_empty());
        // They say which rows are acted upon, not which ones are joined.
        let told = predicates.map(|clause| format!("({})", text(&clause.predicate)));
        let told: Vec<String> = std::iter::once("true".to_owned()).chain(told).collect();
        let condition = format!("({}) AND ({})", text(&merge.condition), told.join(" OR "));
        let mut twins = Vec::new();
        for clause in &merge.clauses {
            match &clause.action {
                Action::Update(set) => {
                    twins.push(format!("UPDATE {target} SET {} FROM {from} WHERE {condition}", text(set)));
                }
                Action::Delete | Action::Nothing => {}
                Action::Insert { columns, values } => {
                    let (name, columns, values) = (text(&merge.name), text(columns), text(values));
                    twins.push(match constants {
                        Some(_) => format!("INSERT INTO {name} {columns} VALUES ({values})"),
                        None => format!("INSERT INTO {name} {columns} SELECT {values} FROM {from}"),
                    });
                }
            }
        }
        twins.push(format!("DELETE FROM {target} USING {from} WHERE {condition}"));
        let mut whole: Option<Shape> = None;
        for twin in &twins {
            let shape = self.twin(twin, source.params)?;
            whole = Some(match whole {
                None => shape,
                Some(whole) => together(whole, shape)?,
            });
        }
        let mut whole = whole?;
        let fits = match &whole.route {
            Route::Keyed(keyed) => keyed.home_table.is_none() && (keyed.everywhere || whole.scatter.is_ok()),
            Route::Fixed { .. } => true,
            Route::Refuse(_) => false,
        };
        whole.deal = Err("it is a MERGE".into());
        // The source's constants stand in the twins more often than in the statement.
        let uses = |number: u16| source.tokens.iter().filter(|token| token.kind == TokenKind::Param(number)).count();
        whole.ambiguous.retain(|number| uses(*number) > 1);
        let cacheable = Err(NoCacheReason::Write);
        let whole = Shape { access: Access::Write, client_params: source.params, cacheable, engine: false, ..whole };
        fits.then_some(whole)
    }

    /// A statement that stands for a part of another one.
    fn twin(&mut self, text: &str, params: u16) -> Option<Shape> {
        let mut tokens = Vec::new();
        lex(text, &mut tokens).ok()?;
        let mut shape = self.data(Source { sql: text, original: &tokens, text, tokens: &tokens, params }, None);
        shape.carry = None;
        Some(shape)
    }
}

impl Merge {
    /// `None`: another statement, or one with clauses that are not looked into (ONLY, BY SOURCE, RETURNING, OVERRIDING, DEFAULT VALUES).
    pub fn find(sql: &str, tokens: &[Token]) -> Option<Merge> {
        let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
        let is = |at: usize, word: &str| at < end && tokens[at].is_word(sql, word);
        let top = |from: usize, word: &str| (from..end).find(|at| tokens[*at].depth == 0 && is(*at, word));
        if !is(0, "merge") || !is(1, "into") || is(2, "only") || top(0, "returning").is_some() {
            return None;
        }
        let using = top(2, "using")?;
        let mut last = 2;
        while tokens.get(last + 1)?.kind == TokenKind::Dot {
            last += 2;
        }
        let on = top(using, "on")?;
        let starts = |at: &usize| {
            tokens[*at].depth == 0
                && is(*at, "when")
                && (is(at + 1, "matched") || is(at + 1, "not") && is(at + 2, "matched"))
        };
        let whens: Vec<usize> = (on..end).filter(starts).collect();
        let stops = whens.iter().skip(1).copied().chain([end]);
        let clauses = whens.iter().zip(stops).map(|(&at, stop)| Clause::read((sql, tokens), at, stop));
        Some(Merge {
            target: 2..using,
            name: 2..last + 1,
            source: using + 1..on,
            condition: on + 1..*whens.first()?,
            clauses: clauses.collect::<Option<Vec<_>>>()?,
        })
    }
}

impl Clause {
    /// `WHEN [NOT] MATCHED [BY TARGET] [AND predicate] THEN action`
    fn read((sql, tokens): (&str, &[Token]), when: usize, end: usize) -> Option<Clause> {
        let is = |at: usize, word: &str| at < end && tokens[at].is_word(sql, word);
        let matched = is(when + 1, "matched");
        let mut at = when + if matched { 2 } else { 3 };
        if is(at, "by") {
            is(at + 1, "target").then_some(())?;
            at += 2;
        }
        let acts = |at: &usize| ["update", "delete", "insert", "do"].iter().any(|word| is(at + 1, word));
        let then = (at..end).find(|at| tokens[*at].depth == 0 && is(*at, "then") && acts(at))?;
        let predicate = if is(at, "and") { at + 1..then } else { at..then };
        if !is(at, "and") && at != then {
            return None;
        }
        let action = match tokens.get(then + 1)? {
            token if token.is_word(sql, "update") && is(then + 2, "set") => Action::Update(then + 3..end),
            token if token.is_word(sql, "delete") && then + 2 == end => Action::Delete,
            token if token.is_word(sql, "do") => Action::Nothing,
            token if token.is_word(sql, "insert") => {
                let values = (then + 2..end).find(|at| tokens[*at].depth == 0 && is(*at, "values"))?;
                let columns = then + 2..values;
                let opens = |at: usize| tokens.get(at).is_some_and(|token| token.kind == TokenKind::LeftParen);
                let listed =
                    columns.is_empty() || opens(columns.start) && tokens[values - 1].kind == TokenKind::RightParen;
                let whole = opens(values + 1) && tokens[end - 1].kind == TokenKind::RightParen && values + 2 < end - 1;
                (listed && whole).then_some(())?;
                Action::Insert { columns, values: values + 2..end - 1 }
            }
            _ => return None,
        };
        let fits = match action {
            Action::Nothing => true,
            Action::Insert { .. } => !matched,
            Action::Update(_) | Action::Delete => matched,
        };
        fits.then_some(Clause { predicate, action })
    }
}

impl Constants {
    /// `(VALUES (…)) [AS] name (column, …)` of one row, or `(SELECT value AS column, …) [AS] name`.
    fn find(source: Source<'_>, range: &Range<usize>) -> Option<Constants> {
        let (sql, tokens) = (source.text, source.tokens);
        let open = tokens.get(range.start).filter(|token| token.kind == TokenKind::LeftParen)?;
        let closes = |token: &Token| token.kind == TokenKind::RightParen && token.depth == open.depth + 1;
        let close = range.start + tokens[range.clone()].iter().position(closes)?;
        let alias = close + 1 + usize::from(tokens.get(close + 1)?.is_word(sql, "as"));
        let name = word::name(sql, *tokens.get(alias).filter(|_| alias < range.end)?)?;
        let inner = range.start + 1..close;
        let first = tokens.get(inner.start)?;
        let text = |value: &Range<usize>| slice(sql, tokens, value).to_owned();
        let columns = if first.is_word(sql, "values") {
            let row = inner.start + 2..close - 1;
            let plain = tokens[inner.start + 1].kind == TokenKind::LeftParen
                && tokens[row.clone()].iter().all(|token| token.depth > open.depth + 1);
            let listed = alias + 2..range.end.checked_sub(1)?;
            let (values, names) = (split(tokens, row), split(tokens, listed));
            (plain && values.len() == names.len()).then_some(())?;
            let names = names.into_iter().map(|name| word::name(sql, *tokens.get(name.start)?));
            let columns: Option<Vec<_>> =
                names.zip(&values).map(|(name, value)| Some((name?, value.clone()))).collect();
            columns?
        } else if first.is_word(sql, "select") && alias + 1 == range.end {
            let one = |item: &Range<usize>| match &tokens[item.clone()] {
                [.., word, name] if word.is_word(sql, "as") => {
                    Some((word::name(sql, *name)?, item.start..item.end - 2))
                }
                _ => None,
            };
            let from =
                tokens[inner.clone()].iter().any(|token| token.is_word(sql, "from") || token.is_word(sql, "where"));
            if from {
                return None;
            }
            split(tokens, inner.start + 1..inner.end).iter().map(one).collect::<Option<Vec<_>>>()?
        } else {
            return None;
        };
        let constant = |value: &Range<usize>| {
            let one = matches!(tokens[value.start].kind, TokenKind::Param(_) | TokenKind::String | TokenKind::Integer);
            one && (value.len() == 1 || value.len() == 3 && tokens[value.start + 1].kind == TokenKind::Cast)
        };
        let columns =
            columns.iter().filter(|(_, value)| constant(value)).map(|(name, value)| (name.clone(), text(value)));
        Some(Constants { name, columns: columns.collect() })
    }

    /// The text of a range with the constants in the place of the source's columns.
    fn put(&self, source: Source<'_>, range: &Range<usize>) -> String {
        let (sql, tokens) = (source.text, source.tokens);
        if range.is_empty() {
            return String::new();
        }
        let mut text = String::new();
        let mut from = tokens[range.start].start as usize;
        for at in range.clone().filter(|at| at + 2 < range.end) {
            let named = word::name(sql, tokens[at]).is_some_and(|name| name == self.name);
            if !named || tokens[at + 1].kind != TokenKind::Dot {
                continue;
            }
            let column = word::name(sql, tokens[at + 2]);
            let Some((_, value)) = self.columns.iter().find(|(name, _)| Some(name) == column.as_ref()) else {
                continue;
            };
            text.push_str(&sql[from..tokens[at].start as usize]);
            text.push_str(value);
            from = tokens[at + 2].end as usize;
        }
        text.push_str(&sql[from..tokens[range.end - 1].end as usize]);
        text
    }
}
