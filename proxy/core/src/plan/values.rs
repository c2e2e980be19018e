//! The values of one execution, and how they become shard keys and limits.
//!
//! A value weir cannot read exactly as the server would is an error, never a guess: a wrong key is a wrong answer.

use std::borrow::Cow;

use smallvec::SmallVec;

use crate::error::{Blame, UserError, sqlstate};
use crate::sql::facts::{KeySet, Literal as WrittenLiteral, Term};
use crate::sql::lex::{Token, TokenKind};
use crate::sql::normal::{Literal, LiteralKind};
use crate::sql::word;
use crate::topology::key::{binary_integer, parse_integer, parse_uuid};
use crate::topology::{Key, KeyType};

/// One parameter as Bind carries it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Datum<'a> {
    Null,
    Text(&'a [u8]),
    Binary(&'a [u8]),
}

/// What one execution adds to a template.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    pub params: &'a [Datum<'a>],
    /// The original text of the statement that is executed.
    pub sql: &'a str,
    /// Its lifted literals; the n-th is `$(client params + 1 + n)`.
    pub literals: &'a [Literal],
}

/// Keys of one set; most have one.
pub type Keys<'a> = SmallVec<[Key<'a>; 2]>;

/// A value where it comes from.
enum Found<'a> {
    Null,
    Integer(Cow<'a, str>),
    Decimal,
    /// Text without a type of its own: read as whatever it is compared with.
    Text(Cow<'a, [u8]>),
    Binary(&'a [u8]),
}

impl<'a> Values<'a> {
    fn find(&self, number: u16, client_params: u16) -> Result<Found<'a>, UserError> {
        if number <= client_params {
            return match self.params.get(usize::from(number) - 1) {
                Some(Datum::Null) => Ok(Found::Null),
                Some(Datum::Text(text)) => Ok(Found::Text(Cow::Borrowed(text))),
                Some(Datum::Binary(bytes)) => Ok(Found::Binary(bytes)),
                None => Err(missing(number)),
            };
        }
        let index = usize::from(number - client_params - 1);
        let literal = self.literals.get(index).ok_or_else(|| missing(number))?;
        let text = self.sql.get(literal.start as usize..literal.end as usize).ok_or_else(|| missing(number))?;
        match literal.kind {
            LiteralKind::Integer => Ok(Found::Integer(Cow::Borrowed(text))),
            LiteralKind::Decimal => Ok(Found::Decimal),
            LiteralKind::String => {
                let token = Token { kind: TokenKind::String, start: literal.start, end: literal.end, depth: 0 };
                let value = word::string_value(self.sql, token).ok_or_else(|| missing(number))?;
                Ok(Found::Text(match value {
                    Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
                    Cow::Owned(text) => Cow::Owned(text.into_bytes()),
                }))
            }
        }
    }

    /// All keys of a set, in its order; NULLs are equal to nothing and leave no key.
    pub fn keys(&self, set: &'a KeySet, key_type: KeyType, client_params: u16) -> Result<Keys<'a>, UserError> {
        let mut keys = Keys::new();
        for term in &set.terms {
            match term {
                Term::Null => {}
                Term::Param { number, negated } => {
                    let found = self.find(*number, client_params)?;
                    keys.extend(scalar(found, *negated, key_type)?);
                }
                Term::Literal(WrittenLiteral::Number(text)) => keys.extend(scalar(written(text), false, key_type)?),
                Term::Literal(WrittenLiteral::String(text)) => keys.push(text_key(text.as_bytes().into(), key_type)?),
                Term::Array { number } => match self.find(*number, client_params)? {
                    Found::Null => {}
                    Found::Text(text) => text_array(&text, key_type, &mut keys)?,
                    Found::Binary(bytes) => binary_array(bytes, key_type, &mut keys)?,
                    Found::Integer(_) | Found::Decimal => return Err(bad_array()),
                },
                Term::ArrayLiteral(text) => text_array(text.as_bytes(), key_type, &mut keys)?,
            }
        }
        Ok(keys)
    }

    /// A LIMIT or OFFSET; `None` for NULL, which means none.
    pub fn count(&self, term: &Term, client_params: u16) -> Result<Option<u64>, UserError> {
        let found = match term {
            Term::Null => Found::Null,
            Term::Param { number, negated: false } => self.find(*number, client_params)?,
            Term::Literal(WrittenLiteral::Number(text)) => written(text),
            Term::Literal(WrittenLiteral::String(text)) => Found::Text(Cow::Borrowed(text.as_bytes())),
            Term::Param { .. } | Term::Array { .. } | Term::ArrayLiteral(_) => return Err(bad_count()),
        };
        let number = match found {
            Found::Null => return Ok(None),
            Found::Integer(text) => parse_integer(text.as_bytes()),
            Found::Text(text) => parse_integer(&text),
            Found::Binary(bytes) => binary_integer(bytes),
            Found::Decimal => None,
        };
        let number = number.ok_or_else(bad_count)?;
        u64::try_from(number).map(Some).map_err(|_| bad_count())
    }

    /// The text of a lifted number.
    pub fn written_number(&self, number: u16, client_params: u16) -> Option<&'a str> {
        let literal = self.literals.get(usize::from(number.checked_sub(client_params + 1)?))?;
        let text = self.sql.get(literal.start as usize..literal.end as usize)?;
        (literal.kind != LiteralKind::String).then_some(text)
    }

    /// Does any text value read as the present time in a date or timestamp ('now', 'today', …)? Only short values are
    /// looked at, because a date with such a word in it is short.
    pub fn mention_time(&self) -> bool {
        let in_params = self.params.iter().any(|datum| matches!(datum, Datum::Text(text) if is_time_word(text)));
        in_params
            || self.literals.iter().any(|literal| {
                literal.kind == LiteralKind::String
                    && self.sql.as_bytes().get(literal.start as usize..literal.end as usize).is_some_and(is_time_word)
            })
    }
}

const TIME_WORD_BYTES_MAX: usize = 64;

/// Is one of its words 'now', 'today', 'tomorrow' or 'yesterday' (src/backend/utils/adt/datetime.c)?
pub fn is_time_word(text: &[u8]) -> bool {
    text.len() <= TIME_WORD_BYTES_MAX
        && text.split(|byte| !byte.is_ascii_alphabetic()).any(|word| {
            [&b"now"[..], b"today", b"tomorrow", b"yesterday"].iter().any(|name| word.eq_ignore_ascii_case(name))
        })
}

fn written(text: &str) -> Found<'_> {
    if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        Found::Integer(Cow::Borrowed(text))
    } else {
        Found::Decimal
    }
}

/// One value as a key; `None` if it equals nothing.
fn scalar(found: Found<'_>, negated: bool, key_type: KeyType) -> Result<Option<Key<'_>>, UserError> {
    match found {
        Found::Null => Ok(None),
        Found::Integer(text) => {
            if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
                return Err(unreadable("a number that is not plain decimal"));
            }
            let text = if negated { Cow::Owned(format!("-{text}")) } else { text };
            let Some(number) = parse_integer(text.as_bytes()) else {
                // Beyond int8 it is a numeric, and no int8 equals it; but an INSERT of it must fail at the server.
                return Err(out_of_range(&text));
            };
            match key_type {
                KeyType::Int => Ok(Some(Key::Int(number))),
                KeyType::Text => Ok(Some(Key::Text(Cow::Owned(number.to_string().into_bytes())))),
                KeyType::Uuid => Err(unreadable("a number where a uuid is needed")),
            }
        }
        Found::Decimal => Err(unreadable("a number with a fraction or an exponent")),
        Found::Text(_) if negated => Err(unreadable("a negated string")),
        Found::Text(text) => Ok(Some(text_key(text, key_type)?)),
        Found::Binary(bytes) => Ok(Some(binary_key(bytes, key_type)?)),
    }
}

pub fn text_key(text: Cow<'_, [u8]>, key_type: KeyType) -> Result<Key<'_>, UserError> {
    match key_type {
        KeyType::Int => parse_integer(&text).map(Key::Int).ok_or_else(|| invalid(&text, key_type)),
        KeyType::Text => Ok(Key::Text(text)),
        KeyType::Uuid => parse_uuid(&text).map(Key::Uuid).ok_or_else(|| invalid(&text, key_type)),
    }
}

fn binary_key(bytes: &[u8], key_type: KeyType) -> Result<Key<'_>, UserError> {
    match key_type {
        KeyType::Int => binary_integer(bytes)
            .map(Key::Int)
            .ok_or_else(|| unreadable("a binary value that is no int2, int4 or int8")),
        KeyType::Text => Ok(Key::Text(Cow::Borrowed(bytes))),
        KeyType::Uuid => bytes.try_into().map(Key::Uuid).map_err(|_| unreadable("a binary value that is no uuid")),
    }
}

/// Elements of a one-dimensional array in text form (src/backend/utils/adt/arrayfuncs.c, array_in).
fn text_array(text: &[u8], key_type: KeyType, keys: &mut Keys<'_>) -> Result<(), UserError> {
    let blank = |byte: u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let body = text.trim_ascii().strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}")).ok_or_else(bad_array)?;
    let mut at = 0;
    let skip = |mut at: usize| {
        while body.get(at).copied().is_some_and(blank) {
            at += 1;
        }
        at
    };
    at = skip(at);
    if at == body.len() {
        return Ok(());
    }
    loop {
        at = skip(at);
        let mut element = Vec::new();
        let quoted = body.get(at) == Some(&b'"');
        if quoted {
            at += 1;
            loop {
                match body.get(at) {
                    Some(b'"') => break,
                    Some(b'\\') => {
                        element.push(*body.get(at + 1).ok_or_else(bad_array)?);
                        at += 2;
                    }
                    Some(&byte) => {
                        element.push(byte);
                        at += 1;
                    }
                    None => return Err(bad_array()),
                }
            }
            at = skip(at + 1);
        } else {
            while let Some(&byte) = body.get(at) {
                match byte {
                    b',' => break,
                    b'{' | b'}' | b'"' | b'\\' => return Err(bad_array()),
                    _ => element.push(byte),
                }
                at += 1;
            }
            element.truncate(element.trim_ascii_end().len());
            if element.is_empty() {
                return Err(bad_array());
            }
        }
        if quoted || !element.eq_ignore_ascii_case(b"null") {
            keys.push(text_key(Cow::Owned(element), key_type)?.into_owned());
        }
        match body.get(at) {
            None => return Ok(()),
            Some(b',') => at += 1,
            Some(_) => return Err(bad_array()),
        }
    }
}

/// Elements of a one-dimensional array in binary form (array_recv).
fn binary_array<'v>(bytes: &'v [u8], key_type: KeyType, keys: &mut Keys<'v>) -> Result<(), UserError> {
    let word = |at: usize| -> Result<i32, UserError> {
        let bytes = bytes.get(at..at + 4).ok_or_else(bad_array)?;
        Ok(i32::from_be_bytes(bytes.try_into().map_err(|_| bad_array())?))
    };
    let element_type = word(8)? as u32;
    if crate::sql::facts::family(element_type) != Some(key_type) {
        return Err(unreadable("an array of another element type than the key's"));
    }
    let count = match word(0)? {
        0 => return Ok(()),
        1 => word(12)?,
        _ => return Err(bad_array()),
    };
    let mut at = 20;
    for _ in 0..count {
        let length = word(at)?;
        at += 4;
        let Ok(length) = usize::try_from(length) else { continue };
        let element = bytes.get(at..at + length).ok_or_else(bad_array)?;
        keys.push(binary_key(element, key_type)?);
        at += length;
    }
    Ok(())
}

const INVALID_TEXT: &str = "22P02";
const OUT_OF_RANGE: &str = "22003";

fn missing(number: u16) -> UserError {
    UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, format!("there is no value for parameter ${number}"))
}

fn invalid(text: &[u8], key_type: KeyType) -> UserError {
    let shown: String = String::from_utf8_lossy(text).chars().take(100).collect();
    UserError::new(
        Blame::Client,
        INVALID_TEXT,
        format!("invalid input syntax for type {}: \"{shown}\"", key_type.name()),
    )
    .detail("The value is compared with a shard key, so weir has to read it.")
}

fn out_of_range(text: &str) -> UserError {
    let shown: String = text.chars().take(100).collect();
    UserError::new(Blame::Client, OUT_OF_RANGE, format!("value \"{shown}\" is out of range for type bigint"))
        .detail("The value is compared with a shard key, so weir has to read it.")
}

fn unreadable(what: &'static str) -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "weir cannot read this value as a shard key")
        .detail(format!("It is {what}."))
        .hint("Write the value in the key column's own type, for example $1::bigint.")
}

fn bad_array() -> UserError {
    unreadable("not a one-dimensional array of the key column's type")
}

fn bad_count() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this LIMIT or OFFSET cannot be merged")
        .detail("The rows come from several shards, so weir itself applies LIMIT and OFFSET.")
        .hint("Give whole numbers that are not negative.")
}
