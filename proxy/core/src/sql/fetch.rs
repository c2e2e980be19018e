//! How many rows a FETCH or MOVE asks for (fetch_args of src/backend/parser/gram.y).
//!
//! Non-goal: directions other than forward, which only a server's own cursor can follow.

use super::lex::{Token, TokenKind};

/// Rows ahead; `None`: all that are left.
pub type Count = Option<u64>;

/// `Err` for backward, absolute and relative positions, and for what is no FETCH.
pub fn forward(sql: &str, tokens: &[Token]) -> Result<Count, NotForward> {
    let Some((verb, rest)) = tokens.split_first() else { return Err(NotForward) };
    if !verb.is_word(sql, "fetch") && !verb.is_word(sql, "move") {
        return Err(NotForward);
    }
    // The last token is the cursor's name, and FROM or IN may stand before it.
    let [arguments @ .., _] = rest else { return Err(NotForward) };
    let arguments = match arguments {
        [arguments @ .., last] if last.is_word(sql, "from") || last.is_word(sql, "in") => arguments,
        arguments => arguments,
    };
    let count = |token: &Token| match token.kind {
        TokenKind::Integer => token.text(sql).parse().map(Some).map_err(|_| NotForward),
        _ if token.is_word(sql, "all") => Ok(None),
        _ => Err(NotForward),
    };
    match arguments {
        [] => Ok(Some(1)),
        [word] if word.is_word(sql, "next") || word.is_word(sql, "forward") => Ok(Some(1)),
        [one] => count(one),
        [word, one] if word.is_word(sql, "forward") => count(one),
        _ => Err(NotForward),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotForward;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::lex::lex;

    #[test]
    fn counts_are_read() {
        let count = |sql: &str| {
            let mut tokens = Vec::new();
            lex(sql, &mut tokens).expect("tokens");
            forward(sql, &tokens)
        };
        for one in
            ["fetch c", "FETCH FROM c", "fetch next in c", "fetch forward c", "move 1 c", "fetch forward 1 from \"C\""]
        {
            assert_eq!(count(one), Ok(Some(1)), "{one}");
        }
        assert_eq!((count("fetch all from c"), count("move forward all in c")), (Ok(None), Ok(None)));
        assert_eq!(count("fetch 0 c"), Ok(Some(0)));
        for other in
            ["fetch prior c", "fetch backward 2 c", "fetch -1 c", "fetch first c", "fetch absolute 3 c", "close c"]
        {
            assert_eq!(count(other), Err(NotForward), "{other}");
        }
    }
}
