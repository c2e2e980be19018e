//! Whether a statement's answers may be cached, and be served although they are overtaken.
//!
//! Default deny: what is not known to depend on rows alone is not cached, with a reason. Non-goal: one execution and one entry
//! ([`crate::cache::verdict`]).

use super::super::Access;
use super::super::bind::Shape;
use super::super::functions::Harm;
use super::super::reason::NoCacheReason;
use super::super::values::is_time_word;
use super::{Compiler, Source};
use crate::sql::facts::{Facts, Instance, Verb};
use crate::sql::lex::{Token, TokenKind};

impl Compiler<'_> {
    /// Does the configuration let answers from all these tables be cached?
    pub(super) fn allows_caching(&self, instances: &[Instance]) -> Result<(), NoCacheReason> {
        let never = |instance: &Instance| self.schema.rules.is_uncached(&instance.table.schema, &instance.table.name);
        if instances.iter().any(never) { Err(NoCacheReason::Policy) } else { Ok(()) }
    }

    /// For how long does the configuration let answers from all these tables be served although they are overtaken?
    pub(super) fn allows_stale(&self, instances: &[Instance]) -> Option<u32> {
        let rules = self.schema.rules;
        let of = |instance: &Instance| rules.stale_ms(&instance.table.schema, &instance.table.name);
        instances.iter().map(of).min().flatten()
    }
}

pub(super) fn cacheable(facts: &Facts, harm: Harm, source: Source<'_>, shape: &Shape) -> Result<(), NoCacheReason> {
    if facts.verb != Verb::Select {
        return Err(NoCacheReason::NotSelect);
    }
    match shape.access {
        Access::Read => {}
        Access::PrimaryRead(reason) => return Err(NoCacheReason::Primary(reason)),
        Access::Write => return Err(NoCacheReason::Write),
    }
    if facts.instances.is_empty() {
        return Err(NoCacheReason::NoTable);
    }
    if harm > Harm::Immutable {
        return Err(NoCacheReason::Function);
    }
    let time_word = |token: &Token| {
        let string = matches!(
            token.kind,
            TokenKind::String | TokenKind::EscapeString | TokenKind::UnicodeString | TokenKind::DollarString
        );
        string && is_time_word(token.text(source.text).as_bytes())
    };
    if source.tokens.iter().any(time_word) { Err(NoCacheReason::TimeWord) } else { Ok(()) }
}
