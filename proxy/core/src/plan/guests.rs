//! The text of a statement for a shard that has guests: the same, with a condition that leaves them out.
//!
//! The condition stands where the statement says which rows there are: in the WHERE of a block, so that row locks, whole
//! rows and what a primary key decides in GROUP BY stay what they are. Found while slots move only, and the same whatever slots those are.
//! Invariant: a statement that several shards answer together has a place for it, or is refused. What one shard answers alone speaks of
//! keys that the shard owns, and needs none.
//! Non-goals: statements that read sharded tables out of sight (functions, triggers), and the fallback engine, whose tables leave guests
//! out themselves.

use std::ops::Range;

use super::compile::Merge;
use super::refuse;
use super::rewrite::{Edit, Piece, Rewrite, slice};
use super::{Schema, Template};
use crate::error::UserError;
use crate::sql::class::{Class, Copy, CopyDirection, classify};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::normal::Normal;
use crate::sql::parse::{Site, Unparsed, sites};
use crate::sql::rows::FromQuery;
use crate::sql::word::{self, quote_name};
use crate::topology::catalog::{DefaultKind, RelationKind};
use crate::topology::{KeySet, KeyType, Placement, in_sql};

/// Where in a statement guests have to be left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WithoutGuests {
    spots: Vec<Spot>,
}

/// A shard key as an expression.
#[derive(Clone, PartialEq, Eq, Debug)]
struct KeyColumn {
    expression: String,
    column: Box<str>,
    key_type: KeyType,
}

/// One place, in tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Spot {
    /// A block of which these keys must be none of a guest's.
    Block { filter: Filter, keys: Vec<KeyColumn> },
    /// A table, as it is named: a query stands there instead, which begins and ends like this.
    Table { named: Range<usize>, head: String, key: KeyColumn, tail: String },
}

/// The WHERE of a block.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Filter {
    /// The word, if it is there.
    word: Option<usize>,
    /// What stands there has an OR, and needs parentheses.
    either: bool,
    /// One past its last token, or where it would stand.
    end: usize,
}

impl Template {
    /// How the statement is asked of a shard that has guests. `normal` is its normal text.
    pub fn without_guests(&self, normal: &Normal, schema: &Schema<'_>) -> Result<WithoutGuests, UserError> {
        match &self.class {
            Class::Truncate => {
                return Err(refuse::while_moving("TRUNCATE", "would take away rows that are on their way"));
            }
            Class::Ddl(ddl) if matches!(ddl.what, "CREATE MATERIALIZED VIEW" | "REFRESH MATERIALIZED VIEW") => {
                return Err(refuse::while_moving(ddl.what, "would keep rows twice that are on their way"));
            }
            Class::Ddl(_) | Class::Lock => return Ok(WithoutGuests::default()),
            _ => {}
        }
        let mut tokens = Vec::new();
        let found = match lex(&normal.text, &mut tokens) {
            Ok(()) => Search { schema, params: normal.params }.statement(&self.class, &normal.text, &tokens),
            Err(_) => Err(Unparsed("weir cannot cut it into words")),
        };
        found.map_err(|Unparsed(why)| refuse::meets_guests(why, self.is_write()))
    }
}

impl WithoutGuests {
    /// The statement that `tokens` were cut from, edited by `merged` if several answers are put together, as a shard is asked that
    /// has rows of these and does not own them.
    pub fn text(&self, (sql, tokens): (&str, &[Token]), merged: Option<&Rewrite>, foreign: &KeySet) -> String {
        let mut edits = Vec::new();
        for spot in &self.spots {
            match spot {
                Spot::Block { filter, keys } => filter.edit(keys, foreign, &mut edits),
                Spot::Table { named, head, key, tail } => {
                    let query = format!("({head} WHERE {}){tail}", key.outside(foreign));
                    edits.push(Edit { range: named.clone(), pieces: vec![Piece::Text(query.into())] });
                }
            }
        }
        merged.cloned().unwrap_or_default().and(edits).apply(sql, tokens)
    }

    /// Is there nothing to leave out?
    pub fn is_empty(&self) -> bool {
        self.spots.is_empty()
    }

    fn shifted(mut self, by: usize) -> Self {
        for spot in &mut self.spots {
            match spot {
                Spot::Block { filter, .. } => {
                    filter.word = filter.word.map(|word| word + by);
                    filter.end += by;
                }
                Spot::Table { named, .. } => *named = named.start + by..named.end + by,
            }
        }
        self
    }
}

impl KeyColumn {
    /// Of the table that goes by this name.
    fn of(called: &str, column: &str, key_type: KeyType) -> Self {
        let expression = format!("{}.{}", quote_name(called), quote_name(column));
        KeyColumn { expression, column: column.into(), key_type }
    }

    fn outside(&self, foreign: &KeySet) -> String {
        in_sql::outside(foreign, &self.expression, self.key_type)
    }
}

impl Filter {
    /// The filter of the block that begins with this token.
    fn find(text: &str, tokens: &[Token], block: usize) -> Filter {
        let depth = tokens[block].depth;
        // A closing parenthesis has the depth of what it closes.
        let outside = |token: &Token| {
            token.depth < depth
                || token.depth == depth && matches!(token.kind, TokenKind::RightParen | TokenKind::Semicolon)
        };
        let behind = |at: &usize| outside(&tokens[*at]) || follows_where(text, tokens, *at, depth);
        let end = (block + 1..tokens.len()).find(behind).unwrap_or(tokens.len());
        let word = (block + 1..end).find(|at| is_keyword(text, tokens, *at, depth, "where"));
        let either = word.is_some_and(|word| (word + 1..end).any(|at| is_keyword(text, tokens, at, depth, "or")));
        Filter { word, either, end }
    }

    fn edit(&self, keys: &[KeyColumn], foreign: &KeySet, edits: &mut Vec<Edit>) {
        let mut insert = |at: usize, text: String| {
            edits.push(Edit { range: at..at, pieces: vec![Piece::Text(text.into())] });
        };
        let conditions: Vec<String> = keys.iter().map(|key| key.outside(foreign)).collect();
        let conditions = conditions.join(" AND ");
        match self.word {
            None => insert(self.end, format!(" WHERE {conditions}")),
            Some(_) if !self.either => insert(self.end, format!(" AND {conditions}")),
            Some(word) => {
                insert(word + 1, "(".to_owned());
                insert(self.end, format!(") AND {conditions}"));
            }
        }
    }
}

/// Is it this word, at this depth, and no name? After a dot or AS even a keyword is one.
fn is_keyword(text: &str, tokens: &[Token], at: usize, depth: u16, word: &str) -> bool {
    let named = at > 0 && (tokens[at - 1].kind == TokenKind::Dot || tokens[at - 1].is_word(text, "as"));
    tokens[at].depth == depth && tokens[at].is_word(text, word) && !named
}

/// Does a clause begin here that stands behind WHERE, or another block? All these words are reserved.
fn follows_where(text: &str, tokens: &[Token], at: usize, depth: u16) -> bool {
    const WORDS: &[&str] =
        &["except", "fetch", "for", "having", "intersect", "limit", "offset", "returning", "union", "window"];
    const WITH_BY: &[&str] = &["group", "order"];
    let by = || tokens.get(at + 1).is_some_and(|next| next.is_word(text, "by"));
    WORDS.iter().any(|word| is_keyword(text, tokens, at, depth, word))
        || by() && WITH_BY.iter().any(|word| is_keyword(text, tokens, at, depth, word))
}

struct Search<'a> {
    schema: &'a Schema<'a>,
    /// Parameters the client wrote.
    params: u16,
}

impl Search<'_> {
    fn statement(&self, class: &Class, text: &str, tokens: &[Token]) -> Result<WithoutGuests, Unparsed> {
        match class {
            Class::Select | Class::Values | Class::Update | Class::Delete | Class::With { .. } => {
                self.blocks(text, tokens)
            }
            Class::Insert => {
                let insert = FromQuery::find(text, tokens).ok_or(Unparsed("weir cannot tell what it inserts"))?;
                self.part(text, tokens, insert.query)
            }
            Class::Merge => self.merge(text, tokens),
            Class::Explain { inner, .. } => self.part(text, tokens, *inner..tokens.len()),
            Class::Declare { .. } => {
                let found = tokens.iter().position(|token| token.is_word(text, "for"));
                let query = found.ok_or(Unparsed("its cursor is not understood"))? + 1;
                self.part(text, tokens, query..tokens.len())
            }
            Class::Copy(copy) if copy.direction == CopyDirection::To => self.copied(copy, text, tokens),
            _ => Err(Unparsed("this kind of statement is not analysed")),
        }
    }

    /// A statement inside another one.
    fn part(&self, text: &str, tokens: &[Token], range: Range<usize>) -> Result<WithoutGuests, Unparsed> {
        let part = tokens.get(range.clone()).filter(|part| !part.is_empty()).ok_or(Unparsed("it is empty"))?;
        // Cut again from here on, so that it begins at depth 0.
        let text = slice(text, tokens, &(range.start..range.start + part.len()));
        let mut own = Vec::new();
        lex(text, &mut own).map_err(|_| Unparsed("weir cannot cut it into words"))?;
        Ok(self.statement(&classify(text, &own), text, &own)?.shifted(range.start))
    }

    fn blocks(&self, text: &str, tokens: &[Token]) -> Result<WithoutGuests, Unparsed> {
        let mut found: Vec<(usize, Vec<KeyColumn>)> = Vec::new();
        for Site { block, called, table } in sites(text, tokens, self.params, self.schema)? {
            let Placement::Sharded { key, key_type } = self.schema.placement(&table) else { continue };
            let key = KeyColumn::of(&called, key, *key_type);
            match found.iter_mut().find(|(known, _)| *known == block) {
                Some((_, keys)) => keys.push(key),
                None => found.push((block, vec![key])),
            }
        }
        let spot = |(block, keys)| Spot::Block { filter: Filter::find(text, tokens, block), keys };
        Ok(WithoutGuests { spots: found.into_iter().map(spot).collect() })
    }

    /// MERGE: guests match nothing, and nothing is made of them.
    ///
    /// Rows of a sharded source meet rows of the target with equal keys only, and of any other source none is inserted, or the
    /// statement would not be spread: so no row that matched a guest fails to match because of the condition, and is inserted.
    fn merge(&self, text: &str, tokens: &[Token]) -> Result<WithoutGuests, Unparsed> {
        let merge = Merge::find(text, tokens).ok_or(Unparsed("its MERGE is not understood"))?;
        let mut spots = Vec::new();
        if let Some((_, key)) = self.named(text, tokens, &merge.target) {
            let (on, end) = (merge.condition.start - 1, merge.condition.end);
            let depth = tokens[on].depth;
            let either = merge.condition.clone().any(|at| is_keyword(text, tokens, at, depth, "or"));
            spots.push(Spot::Block { filter: Filter { word: Some(on), either, end }, keys: vec![key] });
        }
        let source = merge.source;
        if tokens.get(source.start).is_some_and(|token| token.kind == TokenKind::LeftParen) {
            // A closing parenthesis has the depth of what it closes.
            let closes = |at: &usize| tokens[*at].kind == TokenKind::RightParen && tokens[*at].depth == 1;
            let end = source.clone().find(closes).ok_or(Unparsed("its source is not understood"))?;
            spots.extend(self.part(text, tokens, source.start + 1..end)?.spots);
        } else if let Some((name, key)) = self.named(text, tokens, &source) {
            let tail = if name.len() == source.len() {
                format!(" AS {}", tokens[name.end - 1].text(text))
            } else {
                String::new()
            };
            let key = KeyColumn { expression: quote_name(&key.column), ..key };
            let head = format!("SELECT * FROM {}", slice(text, tokens, &name));
            spots.push(Spot::Table { named: name, head, key, tail });
        }
        Ok(WithoutGuests { spots })
    }

    /// The name of a sharded table in `name [[AS] alias …]`, and its key.
    fn named(&self, text: &str, tokens: &[Token], range: &Range<usize>) -> Option<(Range<usize>, KeyColumn)> {
        let mut end = range.start + 1;
        while end + 1 < range.end && tokens[end].kind == TokenKind::Dot {
            end += 2;
        }
        let mut parts = (range.start..end).step_by(2).rev().map(|at| word::name(text, tokens[at]));
        let name = parts.next()??;
        let resolved = self.schema.resolve(parts.next().flatten().as_deref(), &name);
        let Placement::Sharded { key, key_type } = self.schema.placement(&resolved) else { return None };
        let alias = end + usize::from(tokens.get(end).is_some_and(|token| token.is_word(text, "as")));
        let called = if end < range.end { word::name(text, tokens[alias])? } else { name };
        Some((range.start..end, KeyColumn::of(&called, key, *key_type)))
    }

    /// COPY … TO.
    fn copied(&self, copy: &Copy, text: &str, tokens: &[Token]) -> Result<WithoutGuests, Unparsed> {
        let Some(relation) = &copy.relation else {
            let end = tokens.iter().position(|token| token.kind == TokenKind::RightParen && token.depth <= 1);
            return self.part(text, tokens, 2..end.ok_or(Unparsed("its COPY is not understood"))?);
        };
        let name = self.schema.resolve(relation.schema.as_deref(), &relation.name);
        let (Some(known), Placement::Sharded { key, key_type }) =
            (self.schema.relation(&name), self.schema.placement(&name))
        else {
            return Err(Unparsed("weir does not know the columns of its table"));
        };
        if known.kind != RelationKind::PlainTable {
            return Err(Unparsed("its table has partitions, children, rules or row security"));
        }
        let to = tokens.iter().position(|token| token.depth == 0 && token.is_word(text, "to"));
        let table = 1..to.ok_or(Unparsed("its COPY is not understood"))?;
        let listed = table.clone().find(|at| tokens[*at].kind == TokenKind::LeftParen);
        let columns = match listed {
            Some(open) => slice(text, tokens, &(open + 1..table.end - 1)).to_owned(),
            None => {
                // As CopyGetAttnums in src/backend/commands/copy.c chooses them.
                let copied = known.columns.iter().filter(|column| column.default != DefaultKind::Generated);
                copied.map(|column| quote_name(&column.name)).collect::<Vec<_>>().join(", ")
            }
        };
        let from = slice(text, tokens, &(1..listed.unwrap_or(table.end)));
        let key = KeyColumn { expression: quote_name(key), column: key.clone(), key_type: *key_type };
        let (head, tail) = (format!("SELECT {columns} FROM {from}"), String::new());
        Ok(WithoutGuests { spots: vec![Spot::Table { named: table, head, key, tail }] })
    }
}
