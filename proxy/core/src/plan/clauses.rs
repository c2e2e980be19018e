//! Where the clauses of a top-level SELECT block stand, in token indexes.
//!
//! Works on tokens alone; the planner compares the counts with the parsed statement and refuses when they differ.

use std::ops::Range;

use super::formula::closed;

use crate::sql::lex::{Token, TokenKind};

/// Token ranges of one SELECT block. `None` where the clause is absent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Clauses {
    pub items: Vec<Range<usize>>,
    pub group: Option<Listed>,
    pub having: Option<Range<usize>>,
    pub order: Option<Listed>,
    /// LIMIT or FETCH FIRST.
    pub limit: Option<Valued>,
    pub offset: Option<Valued>,
    /// One past the last token of the statement (its semicolon excluded).
    pub end: usize,
}

/// A clause that is a list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub whole: Range<usize>,
    pub items: Vec<Range<usize>>,
}

/// A clause that is one value; `value` is empty in `FETCH FIRST ROW`, which means one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Valued {
    pub whole: Range<usize>,
    pub value: Range<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keyword {
    Select,
    From,
    Where,
    Group,
    Having,
    Order,
    Limit,
    Offset,
    Fetch,
    Foreign,
}

fn keyword(sql: &str, tokens: &[Token], index: usize) -> Option<Keyword> {
    let token = tokens[index];
    if token.depth != 0 || token.kind != TokenKind::Word {
        return None;
    }
    let word = |index: usize, word: &str| tokens.get(index).is_some_and(|token| token.is_word(sql, word));
    // After a dot or AS even a keyword is a name.
    if index > 0 && (tokens[index - 1].kind == TokenKind::Dot || word(index - 1, "as")) {
        return None;
    }
    let found = match token.text(sql).to_ascii_lowercase().as_str() {
        "select" => Keyword::Select,
        "from" => {
            let distinct =
                index >= 2 && word(index - 1, "distinct") && (word(index - 2, "is") || word(index - 2, "not"));
            if distinct {
                return None;
            }
            Keyword::From
        }
        "where" => Keyword::Where,
        "group" if word(index + 1, "by") => Keyword::Group,
        "having" => Keyword::Having,
        "order" if word(index + 1, "by") => Keyword::Order,
        "limit" => Keyword::Limit,
        "offset" => Keyword::Offset,
        "fetch" => Keyword::Fetch,
        "union" | "intersect" | "except" | "window" | "for" | "into" => Keyword::Foreign,
        _ => return None,
    };
    Some(found)
}

/// Splits a statement `[WITH …] SELECT …`; `None` if it has a clause that is not known here.
pub fn clauses(sql: &str, tokens: &[Token]) -> Option<Clauses> {
    let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
    let mut marks: Vec<(Keyword, usize)> =
        (0..end).filter_map(|index| Some((keyword(sql, tokens, index)?, index))).collect();
    if marks.first()?.0 != Keyword::Select || marks.iter().filter(|mark| mark.0 == Keyword::Select).count() != 1 {
        return None;
    }
    marks.push((Keyword::Foreign, end));
    let mut found = Clauses { end, ..Clauses::default() };
    for pair in marks.windows(2) {
        let (kind, whole) = (pair[0].0, pair[0].1..pair[1].1);
        match kind {
            Keyword::Select => {
                let mut start = whole.start + 1;
                while tokens.get(start).is_some_and(|token| token.is_word(sql, "all") || token.is_word(sql, "distinct"))
                {
                    start += 1;
                }
                if tokens.get(start).is_some_and(|token| token.is_word(sql, "on")) {
                    start = closed(tokens, start + 1, whole.end)?;
                }
                found.items = split(tokens, start..whole.end);
            }
            Keyword::From | Keyword::Where => {}
            Keyword::Having => {
                if found.having.replace(whole).is_some() {
                    return None;
                }
            }
            Keyword::Group => {
                let items = split(tokens, whole.start + 2..whole.end);
                if found.group.replace(Listed { whole, items }).is_some() {
                    return None;
                }
            }
            Keyword::Order => {
                let items = split(tokens, whole.start + 2..whole.end);
                if found.order.replace(Listed { whole, items }).is_some() {
                    return None;
                }
            }
            Keyword::Limit => {
                let value = whole.start + 1..whole.end;
                if found.limit.replace(Valued { whole, value }).is_some() {
                    return None;
                }
            }
            Keyword::Offset => {
                let mut value = whole.start + 1..whole.end;
                if value.len() > 1
                    && (tokens[value.end - 1].is_word(sql, "rows") || tokens[value.end - 1].is_word(sql, "row"))
                {
                    value.end -= 1;
                }
                if found.offset.replace(Valued { whole, value }).is_some() {
                    return None;
                }
            }
            Keyword::Fetch => {
                let value = fetched(sql, tokens, &whole)?;
                if found.limit.replace(Valued { whole, value }).is_some() {
                    return None;
                }
            }
            Keyword::Foreign => return None,
        }
    }
    Some(found)
}

/// The count in `FETCH {FIRST | NEXT} [count] {ROW | ROWS} {ONLY | WITH TIES}`.
fn fetched(sql: &str, tokens: &[Token], whole: &Range<usize>) -> Option<Range<usize>> {
    let ends = |end: usize, words: &[&str]| {
        let start = end.checked_sub(words.len()).filter(|start| *start >= whole.start + 2)?;
        words.iter().zip(start..).all(|(word, at)| tokens[at].is_word(sql, word)).then_some(start)
    };
    let end = ends(whole.end, &["only"]).or_else(|| ends(whole.end, &["with", "ties"]))?;
    let end = ends(end, &["rows"]).or_else(|| ends(end, &["row"]))?;
    Some(whole.start + 2..end)
}

fn split(tokens: &[Token], range: Range<usize>) -> Vec<Range<usize>> {
    let mut items = Vec::new();
    let mut start = range.start;
    for index in range.clone() {
        if tokens[index].kind == TokenKind::Comma && tokens[index].depth == 0 {
            items.push(start..index);
            start = index + 1;
        }
    }
    if start < range.end {
        items.push(start..range.end);
    }
    items
}

/// The part of an ORDER BY item that is its expression.
pub fn order_expression(sql: &str, tokens: &[Token], item: &Range<usize>) -> Range<usize> {
    let mut range = item.clone();
    let ends = |range: &Range<usize>, word: &str| range.len() > 1 && tokens[range.end - 1].is_word(sql, word);
    if ends(&range, "first") || ends(&range, "last") {
        let shorter = range.start..range.end - 1;
        if ends(&shorter, "nulls") {
            range = shorter.start..shorter.end - 1;
        }
    }
    if ends(&range, "asc") || ends(&range, "desc") {
        range.end -= 1;
    }
    range
}

/// The part of a select item that is its expression, given that it has an alias or not.
pub fn item_expression(sql: &str, tokens: &[Token], item: &Range<usize>, aliased: bool) -> Range<usize> {
    if !aliased || item.len() < 2 {
        return item.clone();
    }
    let end = item.end - 1;
    if end - item.start > 1 && tokens[end - 1].is_word(sql, "as") { item.start..end - 1 } else { item.start..end }
}

/// Are two token ranges the same, but for the case of words, white space and comments?
pub fn same_tokens(sql: &str, tokens: &[Token], left: &Range<usize>, right: &Range<usize>) -> bool {
    left.len() == right.len()
        && left.clone().zip(right.clone()).all(|(left, right)| {
            let (left, right) = (tokens[left], tokens[right]);
            left.kind == right.kind
                && if left.kind == TokenKind::Word {
                    left.text(sql).eq_ignore_ascii_case(right.text(sql))
                } else {
                    left.text(sql) == right.text(sql)
                }
        })
}
