//! What weir learns from SQL text, in the order in which it is learnt.
//!
//! [`lex`] cuts text into tokens exactly as Postgres does; [`word`] reads the value behind a token; [`normal`] lifts literals,
//! so that statements of one shape share a plan; [`rows`] finds the rows of an INSERT; [`class`] says what kind of statement it is. All of that from tokens alone. [`parse`] learns [`facts`] of what is left to
//! plan: which relations, restricted to which keys.
//!
//! Invariant: a statement is never re-printed. Whatever is changed is expressed as edits of the original bytes.

pub mod class;
mod cursor;
pub mod databases;
pub mod facts;
pub mod fetch;
pub mod hint;
pub mod lex;
pub mod normal;
pub mod parse;
pub mod rows;
pub mod word;
