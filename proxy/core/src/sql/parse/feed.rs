//! Our tokens as the parser's own, so that no text is cut twice.
//!
//! The parser's tokenizer allocates each blank, counts lines, and knows the string syntaxes of a dozen servers; for 4 KB that is a
//! third of the cost of planning. Invariant: what is made here is what it would have made of the same text, blanks left out,
//! which the parser skips; where that is not plain to see, nothing is made and the text is cut again.

use sqlparser::tokenizer::Token as Theirs;

use crate::sql::lex::{Token, TokenKind};

/// All of `tokens`, or `None` if one has no plain counterpart.
pub fn parser_tokens(text: &str, tokens: &[Token]) -> Option<Vec<Theirs>> {
    tokens.iter().map(|token| counterpart(token.text(text), token.kind)).collect()
}

fn counterpart(text: &str, kind: TokenKind) -> Option<Theirs> {
    Some(match kind {
        TokenKind::Word => Theirs::make_word(text, None),
        TokenKind::QuotedWord => Theirs::make_word(between(text, '"')?, Some('"')),
        TokenKind::Integer | TokenKind::Decimal => Theirs::Number(text.to_owned(), false),
        TokenKind::String => Theirs::SingleQuotedString(between(text, '\'')?.to_owned()),
        TokenKind::Param(_) => Theirs::Placeholder(text.to_owned()),
        TokenKind::Operator => operator(text)?,
        TokenKind::Cast => Theirs::DoubleColon,
        TokenKind::LeftParen => Theirs::LParen,
        TokenKind::RightParen => Theirs::RParen,
        TokenKind::LeftBracket => Theirs::LBracket,
        TokenKind::RightBracket => Theirs::RBracket,
        TokenKind::Comma => Theirs::Comma,
        TokenKind::Semicolon => Theirs::SemiColon,
        TokenKind::Dot => Theirs::Period,
        TokenKind::EscapeString
        | TokenKind::UnicodeString
        | TokenKind::BitString
        | TokenKind::DollarString
        | TokenKind::Colon
        | TokenKind::ColonEquals
        | TokenKind::DotDot => return None,
    })
}

/// What stands between two quotes, if there is no other quote and no escape in it.
fn between(text: &str, quote: char) -> Option<&str> {
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    (!inner.contains([quote, '\\'])).then_some(inner)
}

fn operator(text: &str) -> Option<Theirs> {
    Some(match text {
        "=" => Theirs::Eq,
        "<>" | "!=" => Theirs::Neq,
        "<" => Theirs::Lt,
        ">" => Theirs::Gt,
        "<=" => Theirs::LtEq,
        ">=" => Theirs::GtEq,
        "+" => Theirs::Plus,
        "-" => Theirs::Minus,
        "*" => Theirs::Mul,
        "/" => Theirs::Div,
        "%" => Theirs::Mod,
        "||" => Theirs::StringConcat,
        "->" => Theirs::Arrow,
        "->>" => Theirs::LongArrow,
        "@>" => Theirs::AtArrow,
        "<@" => Theirs::ArrowAt,
        "@@" => Theirs::AtAt,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use sqlparser::dialect::PostgreSqlDialect;
    use sqlparser::tokenizer::Tokenizer;

    use super::*;
    use crate::sql::lex::lex;

    fn theirs(text: &str) -> Vec<Theirs> {
        let tokens = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize().expect("the parser's tokenizer takes it");
        tokens.into_iter().filter(|token| !matches!(token, Theirs::Whitespace(_))).collect()
    }

    #[test]
    fn tokens_are_those_the_parser_would_make() {
        for text in [
            "select a, b.c, \"D d\" from t where x = 'y' and z in (1, 2.5, $1) -- end",
            "SELECT /* c */ a::int[], -1e5, .5, 7. FROM t WHERE a <> 1 OR b != 2 OR c<=3 OR d>=4 OR e<5 OR f>6",
            "insert into t (a) values ($1,$2),(default,null) returning a||b, a->'x', a->>'y', a @> b, a <@ b, a @@ b;",
            "select 1+2-3*4/5%6, ausgewählt, \"größe\", a$b, _c1 from s.t limit 10 offset $3",
            "update t set a = case when b then 'ü' else '' end where k = $1",
        ] {
            let mut tokens = Vec::new();
            lex(text, &mut tokens).expect("lexes");
            assert_eq!(parser_tokens(text, &tokens), Some(theirs(text)), "{text}");
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_the_parser() {
        for text in [
            "select E'a'",
            "select $$a$$",
            "select 'it''s'",
            "select 'a\\b'",
            "select a ~* b",
            "select U&'x'",
            "select a[1:2]",
        ] {
            let mut tokens = Vec::new();
            lex(text, &mut tokens).expect("lexes");
            assert_eq!(parser_tokens(text, &tokens), None, "{text}");
        }
    }
}
