//! Statements that write inside WITH, over several shards: every part and the main statement by itself, and then together.
//!
//! What a part returns are rows of the table it writes, so where its name stands in FROM, the main statement may be looked at as if the
//! table itself stood there: if that could run on every shard for itself, so can the statement, whose text stays as it is.
//! Invariant: a part runs to its end whatever is read of it, so the statement goes wherever any part has rows.
//! Non-goals: parts whose rows have to meet those of another shard.

use std::ops::Range;

use super::super::bind::{Keyed, Need, Route, Scatter, Shape};
use super::super::rewrite::slice;
use super::super::{Access, NoCacheReason};
use super::{Compiler, Source};
use crate::sql::facts::TableName;
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::normal::Normal;
use crate::sql::rows::split;
use crate::sql::word;
use crate::topology::Placement;

/// `WITH name AS (…), …` and what follows.
struct Parts {
    parts: Vec<(String, Range<usize>)>,
    main: Range<usize>,
}

/// A part that returns rows of a table it writes.
struct Returned {
    name: String,
    /// As written in the part.
    table: String,
    /// It touches rows of certain keys only.
    confined: bool,
}

/// Words that may follow a table in FROM and are no alias of it.
const AFTER_TABLE: &[&str] = &[
    "cross",
    "except",
    "fetch",
    "for",
    "full",
    "group",
    "having",
    "inner",
    "intersect",
    "join",
    "left",
    "limit",
    "natural",
    "offset",
    "on",
    "order",
    "returning",
    "right",
    "set",
    "union",
    "using",
    "where",
    "window",
];

impl Compiler<'_> {
    /// WITH around or in front of a write, over several shards.
    pub(super) fn with_writes(&mut self, source: Source<'_>, normal: &Normal) -> Shape {
        let whole = self.data(source, Some(normal));
        let Some(parts) = self.parts(source) else { return whole };
        let cacheable = Err(NoCacheReason::Write);
        Shape { access: Access::Write, client_params: source.params, cacheable, engine: false, ..parts }
    }

    /// The plan of a statement with writes in WITH; `None`: it is not of the kind that can be taken apart, or must not be spread.
    fn parts(&mut self, source: Source<'_>) -> Option<Shape> {
        let Parts { parts, main } = find(source)?;
        let mut returned: Vec<Returned> = Vec::new();
        let mut whole: Option<Shape> = None;
        for (name, body) in parts {
            // The name of a query may be that of a table, and what stands in FROM then would be taken for the table.
            is_write(source, &body).then_some(())?;
            let mut shape = self.part(source, &body, &returned)?;
            let confined = confine(source, &body, &returned, &mut shape)?;
            let table = self.returned_table(source, &body)?;
            returned.push(Returned { name, table, confined });
            whole = Some(match whole {
                None => shape,
                Some(whole) => together(whole, shape)?,
            });
        }
        let mut shape = self.part(source, &main, &returned)?;
        confine(source, &main, &returned, &mut shape)?;
        let mut whole = together(whole?, shape)?;
        whole.deal = Err("it writes inside WITH".into());
        Some(whole)
    }

    /// One part planned as if it stood alone, and could be spread or has its keys.
    fn part(&mut self, source: Source<'_>, range: &Range<usize>, returned: &[Returned]) -> Option<Shape> {
        let text = with_tables(source, range, returned)?;
        let mut tokens = Vec::new();
        lex(&text, &mut tokens).ok()?;
        let own = Source { sql: &text, original: &tokens, text: &text, tokens: &tokens, params: source.params };
        let mut shape = self.data(own, None);
        if !matches!(shape.route, Route::Keyed(Keyed { home_table: None, .. })) {
            return None;
        }
        if let Ok(Scatter { read: Some(read) }) = &shape.scatter {
            shape.scatter = if read.concatenates() {
                Ok(Scatter { read: None })
            } else {
                Err("its SELECT needs the rows of all shards together, and it writes inside WITH".into())
            };
        }
        Some(shape)
    }

    /// The table whose rows a writing part returns, if what it returns has its key under its own name or not at all.
    fn returned_table(&self, source: Source<'_>, range: &Range<usize>) -> Option<String> {
        let (sql, tokens) = (source.text, source.tokens);
        let mut at = range.start + 1 + usize::from(!tokens[range.start].is_word(sql, "update"));
        let start = at;
        while tokens.get(at + 1).is_some_and(|next| next.kind == TokenKind::Dot) {
            at += 2;
        }
        let table = start..at + 1;
        let mut name: Vec<String> = table.clone().filter_map(|at| word::name(sql, tokens[at])).collect();
        let last = name.pop()?;
        let resolved: TableName = self.schema.resolve(name.last().map(String::as_str), &last);
        let Placement::Sharded { key, .. } = self.schema.placement(&resolved) else { return None };
        let depth = tokens[range.start].depth;
        let top = |word: &str| range.clone().find(|at| tokens[*at].depth == depth && tokens[*at].is_word(sql, word));
        let Some(returning) = top("returning") else { return Some(slice(sql, tokens, &table).to_owned()) };
        let joined = !tokens[range.start].is_word(sql, "insert")
            && (top("using").is_some() || top("from").is_some_and(|at| at > table.end));
        for item in split(tokens, returning + 1..range.end) {
            let fits = match &tokens[item.clone()] {
                [star] if star.text(sql) == "*" => !joined,
                [column] => column.kind == TokenKind::Word || column.kind == TokenKind::QuotedWord,
                [owner, dot, column] if dot.kind == TokenKind::Dot => {
                    // Of another table, a column of that name would be another one.
                    let own = !joined || word::name(sql, *owner).is_some_and(|owner| owner == last);
                    own || column.text(sql) != "*" && word::name(sql, *column).is_some_and(|name| *name != **key)
                }
                [.., word, alias] if word.is_word(sql, "as") => {
                    word::name(sql, *alias).is_some_and(|name| *name != **key)
                }
                _ => false,
            };
            if !fits {
                return None;
            }
        }
        Some(slice(sql, tokens, &table).to_owned())
    }
}

/// Notes that a part only touches rows of certain keys: its own, or those of a part that it reads, row by row. Returns whether it
/// does; `None` if it can neither be spread nor is confined.
fn confine(source: Source<'_>, range: &Range<usize>, returned: &[Returned], shape: &mut Shape) -> Option<bool> {
    let tokens = &source.tokens[range.clone()];
    let says = |word: &str| tokens.iter().any(|token| token.is_word(source.text, word));
    let outer = ["left", "right", "full"].into_iter().any(says);
    // In FROM itself, so that there is no row without one of the part's.
    let depth = source.tokens[range.start].depth;
    let drives = |at: usize| {
        let before = source.tokens[at - 1];
        source.tokens[at].depth == depth
            && ["from", "join", "using"].iter().any(|word| before.is_word(source.text, word))
    };
    let reads_confined = returned.iter().filter(|part| part.confined).any(|part| {
        range.clone().any(|at| word::name(source.text, source.tokens[at]).as_deref() == Some(&part.name) && drives(at))
    });
    let Route::Keyed(keyed) = &mut shape.route else { return None };
    keyed.everywhere |= shape.scatter.is_ok() && reads_confined && !outer;
    (keyed.everywhere || shape.scatter.is_ok()).then_some(keyed.everywhere)
}

/// Both go wherever one of them goes; `None`: they cannot go together.
pub(super) fn together(mut whole: Shape, part: Shape) -> Option<Shape> {
    let offset = whole.demands.len();
    let moved = |need: Need| match need {
        Need::Keyed { table, demand, write } => Need::Keyed { table, demand: demand + offset, write },
        fixed @ Need::Fixed(_) => fixed,
    };
    whole.reads.extend(part.reads.into_iter().map(moved));
    whole.writes.extend(part.writes.into_iter().map(moved));
    match (&mut whole.route, part.route) {
        (Route::Keyed(all), Route::Keyed(one)) => {
            let keys = |shape: &[super::super::bind::Demand], core: Option<usize>| {
                core.and_then(|core| shape.get(core)).map(|demand| (demand.key_type, demand.keys.clone()))
            };
            let same = keys(&whole.demands, all.core).is_some_and(|left| keys(&part.demands, one.core) == Some(left));
            all.core = all.core.filter(|_| same);
            all.everywhere &= one.everywhere;
            all.insert |= one.insert;
            all.varchar |= one.varchar;
        }
        (Route::Fixed { target, reason }, Route::Fixed { target: other, reason: why }) => {
            (*target == other && *reason == why).then_some(())?;
        }
        _ => return None,
    }
    whole.demands.extend(part.demands);
    if whole.scatter.is_ok() {
        whole.scatter = part.scatter;
    }
    whole.ambiguous.extend(part.ambiguous);
    whole.noting = whole.noting.with(part.noting);
    whole.carried_key = None;
    whole.carry = None;
    Some(whole)
}

/// `None`: RECURSIVE, names of columns, MATERIALIZED, or something else that is not looked into.
fn find(source: Source<'_>) -> Option<Parts> {
    let (sql, tokens) = (source.text, source.tokens);
    let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
    tokens.first().filter(|token| token.is_word(sql, "with"))?;
    let mut parts = Vec::new();
    let mut at = 1;
    loop {
        let name = word::name(sql, *tokens.get(at)?)?;
        let open = tokens.get(at + 2).filter(|open| open.kind == TokenKind::LeftParen)?;
        tokens[at + 1].is_word(sql, "as").then_some(())?;
        let closes = |token: &Token| token.kind == TokenKind::RightParen && token.depth == open.depth + 1;
        let close = at + 2 + tokens[at + 2..end].iter().position(closes)?;
        (close > at + 3).then_some(())?;
        parts.push((name, at + 3..close));
        at = close + 1;
        match tokens.get(at)?.kind {
            TokenKind::Comma => at += 1,
            _ => return Some(Parts { parts, main: at..end }).filter(|found| !found.main.is_empty()),
        }
    }
}

fn is_write(source: Source<'_>, range: &Range<usize>) -> bool {
    ["insert", "update", "delete"].iter().any(|word| source.tokens[range.start].is_word(source.text, word))
}

/// A part's text with the tables of other parts in the place of their names; `None` if one of them stands where it is no table.
fn with_tables(source: Source<'_>, range: &Range<usize>, returned: &[Returned]) -> Option<String> {
    let (sql, tokens) = (source.text, source.tokens);
    let mut text = String::new();
    let mut from = tokens[range.start].start as usize;
    for at in range.clone() {
        let Some(name) = word::name(sql, tokens[at]) else { continue };
        let Some(part) = returned.iter().find(|part| part.name == name) else { continue };
        let next = tokens.get(at + 1).filter(|_| at + 1 < range.end);
        let before = tokens[at - 1];
        if next.is_some_and(|next| next.kind == TokenKind::Dot) && before.kind != TokenKind::Dot {
            continue;
        }
        ["from", "join", "using"].iter().any(|word| before.is_word(sql, word)).then_some(())?;
        // IS DISTINCT FROM
        (at < 2 || !tokens[at - 2].is_word(sql, "distinct")).then_some(())?;
        let aliased = next.is_some_and(|next| {
            matches!(next.kind, TokenKind::Word | TokenKind::QuotedWord)
                && !AFTER_TABLE.iter().any(|word| next.is_word(sql, word))
        });
        text.push_str(&sql[from..tokens[at].start as usize]);
        text.push_str(&part.table);
        if !aliased {
            text.push_str(" AS ");
            text.push_str(tokens[at].text(sql));
        }
        from = tokens[at].end as usize;
    }
    text.push_str(&sql[from..tokens[range.end - 1].end as usize]);
    Some(text)
}
