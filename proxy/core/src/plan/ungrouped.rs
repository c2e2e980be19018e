//! Columns outside GROUP BY that a primary key decides. The fallback engine's tables have no keys, so that Postgres says 42803 there;
//! the same column in GROUP BY makes the same groups, and the statement runs.
//!
//! Invariant: only to be asked for a statement that a server with the keys accepts. There every column Postgres complains of is the
//! same within a group, so that one more of them in the list changes no group; nothing else of the text is touched.
//! Non-goals: ROLLUP, CUBE and GROUPING SETS, where a column more is another set.

use std::ops::Range;

use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::word::{self, quote_name};

/// Where a list of GROUP BY ends.
const BEHIND: &[&str] =
    &["except", "fetch", "for", "having", "intersect", "limit", "offset", "order", "union", "window"];

/// The statement with the column in GROUP BY that Postgres's 42803 speaks of: `position` counts characters from 1, as the error
/// does, and `message` names the column where the text has a star. `None`: not to be mended like this.
pub fn grouped_too(sql: &str, position: usize, message: &str) -> Option<String> {
    let (offset, _) = sql.char_indices().nth(position.checked_sub(1)?)?;
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).ok()?;
    let at = tokens.iter().position(|token| (token.start as usize..token.end as usize).contains(&offset))?;
    let column = written(sql, &tokens, at).or_else(|| named(message))?;
    let end = list_end(sql, &tokens, at, &column)?;
    let before = tokens[end - 1].end as usize;
    Some(format!("{}, {column}{}", &sql[..before], &sql[before..]))
}

/// The column that is written there; `None` for a star.
fn written(sql: &str, tokens: &[Token], at: usize) -> Option<String> {
    word::name(sql, tokens[at])?;
    let mut end = at + 1;
    while tokens.get(end).is_some_and(|token| token.kind == TokenKind::Dot) {
        word::name(sql, *tokens.get(end + 1)?)?;
        end += 2;
    }
    let called = tokens.get(end).is_some_and(|token| token.kind == TokenKind::LeftParen);
    (!called).then(|| sql[tokens[at].start as usize..tokens[end - 1].end as usize].to_owned())
}

/// From `column "t.a" must appear in the GROUP BY clause …`, in whatever language.
fn named(message: &str) -> Option<String> {
    let mut quoted = message.split('"').skip(1);
    let (relation, column) = quoted.next().filter(|_| quoted.next().is_some())?.split_once('.')?;
    (!column.contains('.')).then(|| format!("{}.{}", quote_name(relation), quote_name(column)))
}

/// One past the last token of the GROUP BY list of the innermost block around `at` that does not have the column yet.
fn list_end(sql: &str, tokens: &[Token], at: usize, column: &str) -> Option<usize> {
    let mut inner = at;
    let mut depth = tokens[at].depth;
    loop {
        let outside = |token: &Token| token.depth < depth || token.kind == TokenKind::Semicolon;
        let start = tokens[..inner].iter().rposition(outside).map_or(0, |before| before + 1);
        // A closing parenthesis has the depth of what it closes.
        let closes = |token: &Token| token.depth == depth && token.kind == TokenKind::RightParen;
        let behind = |token: &Token| outside(token) || closes(token);
        let end = tokens[inner..].iter().position(behind).map_or(tokens.len(), |after| inner + after);
        let here = |at: usize, word: &str| tokens[at].depth == depth && tokens[at].is_word(sql, word);
        if let Some(select) = (start..=inner).rev().find(|at| here(*at, "select")) {
            let joined = |at: &usize| ["except", "intersect", "union"].iter().any(|word| here(*at, word));
            let end = (inner..end).find(joined).unwrap_or(end);
            let group = (select..end).find(|at| here(*at, "group") && at + 1 < end && here(at + 1, "by"));
            if let Some(group) = group {
                let list = group + 2..end;
                let list = list.start..list.clone().find(|at| BEHIND.iter().any(|word| here(*at, word))).unwrap_or(end);
                if !has(sql, tokens, &list, depth, column) {
                    return is_simple(sql, tokens, &list).then_some(list.end);
                }
            }
        }
        depth = depth.checked_sub(1)?;
        inner = start.checked_sub(1)?;
    }
}

fn has(sql: &str, tokens: &[Token], list: &Range<usize>, depth: u16, column: &str) -> bool {
    let comma = |at: &usize| tokens[*at].depth == depth && tokens[*at].kind == TokenKind::Comma;
    let mut start = list.start;
    let ends: Vec<usize> = list.clone().filter(comma).chain([list.end]).collect();
    ends.into_iter().any(|end| {
        let item = start..end;
        start = end + 1;
        !item.is_empty() && &sql[tokens[item.start].start as usize..tokens[item.end - 1].end as usize] == column
    })
}

/// A list of expressions, and nothing of several grouping sets.
fn is_simple(sql: &str, tokens: &[Token], list: &Range<usize>) -> bool {
    !list.is_empty()
        && list.clone().all(|at| {
            let sets = ["cube", "grouping", "rollup"].iter().any(|word| tokens[at].is_word(sql, word));
            let first = at == list.start || tokens[at - 1].kind == TokenKind::Comma;
            let closed = |next: &Token| next.kind == TokenKind::RightParen;
            let empty = first && tokens[at].kind == TokenKind::LeftParen && tokens.get(at + 1).is_some_and(closed);
            !sets && !empty
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sql` has a mark before the column that Postgres complains of.
    fn edited(sql: &str, message: &str) -> Option<String> {
        let position = sql.chars().position(|letter| letter == '¦').expect("a mark") + 1;
        grouped_too(&sql.replace('¦', ""), position, message)
    }

    #[test]
    fn the_column_joins_the_list_of_its_own_block() {
        for (sql, expected) in [
            (
                "SELECT u.id, ¦u.name, count(*) FROM u GROUP BY u.id",
                Some("SELECT u.id, u.name, count(*) FROM u GROUP BY u.id, u.name"),
            ),
            (
                "SELECT 'ö', lower(coalesce(¦name, 'x')) FROM u GROUP BY 1, id HAVING count(*) > 1 ORDER BY 1 LIMIT 3;",
                Some(
                    "SELECT 'ö', lower(coalesce(name, 'x')) FROM u GROUP BY 1, id, name HAVING count(*) > 1 ORDER BY 1 LIMIT 3;",
                ),
            ),
            (
                "SELECT * FROM (SELECT id, ¦\"Na\".\"me\" AS \"order\" FROM \"Na\" GROUP BY (id)) x GROUP BY a",
                Some(
                    "SELECT * FROM (SELECT id, \"Na\".\"me\" AS \"order\" FROM \"Na\" GROUP BY (id), \"Na\".\"me\") x GROUP BY a",
                ),
            ),
            (
                "SELECT id, (SELECT ¦u.name) FROM u GROUP BY id UNION SELECT 1, a FROM b GROUP BY a",
                Some("SELECT id, (SELECT u.name) FROM u GROUP BY id, u.name UNION SELECT 1, a FROM b GROUP BY a"),
            ),
            // The inner list has it already: it is the outer block's.
            (
                "SELECT (SELECT max(¦u.a) FROM v GROUP BY u.a) FROM u GROUP BY id",
                Some("SELECT (SELECT max(u.a) FROM v GROUP BY u.a) FROM u GROUP BY id, u.a"),
            ),
            (
                "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY x), ¦b FROM u GROUP BY id",
                Some("SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY x), b FROM u GROUP BY id, b"),
            ),
            ("SELECT ¦b FROM u GROUP BY ROLLUP (id)", None),
            ("SELECT ¦b FROM u GROUP BY id, ()", None),
            ("SELECT ¦b FROM u GROUP BY GROUPING SETS (id, (a))", None),
            ("SELECT ¦b, count(*) FROM u", None),
        ] {
            assert_eq!(edited(sql, "").as_deref(), expected, "{sql}");
        }
    }

    #[test]
    fn behind_a_star_the_message_names_it() {
        let message = "column \"u.first name\" must appear in the GROUP BY clause or be used in an aggregate function";
        let expected = "SELECT u.* FROM u GROUP BY id, \"u\".\"first name\"";
        assert_eq!(edited("SELECT ¦u.* FROM u GROUP BY id", message).as_deref(), Some(expected));
        assert_eq!(edited("SELECT ¦* FROM u GROUP BY id", "column \"a.b.c\" must").as_deref(), None);
        assert_eq!(edited("SELECT ¦* FROM u GROUP BY id", "столбец «u.a»").as_deref(), None);
    }
}
