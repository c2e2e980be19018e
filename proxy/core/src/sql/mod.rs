//! What weir learns from SQL text, in the order in which it is learnt.
//!
//! [`lex`] cuts text into tokens exactly as Postgres does; everything below works on those tokens and never on text again.
//!
//! Invariant: a statement is never re-printed. Whatever is changed is expressed as edits of the original bytes.

pub mod facts;
pub mod lex;
pub mod parse;
