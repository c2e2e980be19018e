//! A reading position in the tokens of one statement, for hand-written grammars ([`super::class`]).
//!
//! Invariant: reading never goes beyond the end; every `eat` either takes what it names or takes nothing.

use super::lex::{Token, TokenKind};
use super::word;

#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub sql: &'a str,
    pub tokens: &'a [Token],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(sql: &'a str, tokens: &'a [Token]) -> Self {
        Cursor { sql, tokens, at: 0 }
    }

    pub fn peek(&self) -> Option<Token> {
        self.tokens.get(self.at).copied()
    }

    pub fn is_done(&self) -> bool {
        self.at >= self.tokens.len()
    }

    pub fn sees(&self, word: &str) -> bool {
        self.sees_at(0, word)
    }

    pub fn sees_at(&self, ahead: usize, word: &str) -> bool {
        self.tokens.get(self.at + ahead).is_some_and(|token| token.is_word(self.sql, word))
    }

    pub fn sees_kind(&self, kind: TokenKind) -> bool {
        self.peek().is_some_and(|token| token.kind == kind)
    }

    /// Takes the next word, folded to lower case.
    pub fn word(&mut self) -> Option<String> {
        let token = self.peek().filter(|token| token.kind == TokenKind::Word)?;
        self.at += 1;
        Some(token.text(self.sql).to_ascii_lowercase())
    }

    pub fn eat(&mut self, word: &str) -> bool {
        let found = self.sees(word);
        self.at += usize::from(found);
        found
    }

    /// Takes all of `words` (separated by single blanks) or none.
    pub fn eat_all(&mut self, words: &str) -> bool {
        let found = words.split(' ').enumerate().all(|(ahead, word)| self.sees_at(ahead, word));
        self.at += if found { words.split(' ').count() } else { 0 };
        found
    }

    pub fn eat_any(&mut self, words: &[&str]) -> bool {
        words.iter().any(|word| self.eat(word))
    }

    pub fn eat_kind(&mut self, kind: TokenKind) -> bool {
        let found = self.sees_kind(kind);
        self.at += usize::from(found);
        found
    }

    /// Takes an identifier, folded as Postgres does.
    pub fn name(&mut self) -> Option<String> {
        let name = word::name(self.sql, self.peek()?)?;
        self.at += 1;
        Some(name)
    }

    /// Behind the parenthesis that opens here; the end if it never closes. Does nothing in front of anything else.
    pub fn skip_parens(&mut self) {
        let Some(open) = self.peek().filter(|token| token.kind == TokenKind::LeftParen) else { return };
        let close = self.tokens[self.at..]
            .iter()
            .position(|token| token.kind == TokenKind::RightParen && token.depth == open.depth.saturating_add(1));
        self.at = close.map_or(self.tokens.len(), |length| self.at + length + 1);
    }
}
