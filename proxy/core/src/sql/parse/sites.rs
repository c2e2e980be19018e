//! Which blocks of a statement say what rows of sharded tables there are: where a condition on those rows has to stand.
//!
//! Looked for while slots move only, so the text is parsed anew and nothing of it is kept in [`Facts`](crate::sql::facts::Facts).
//! Invariant: with the condition at every site that is returned, no row that it rejects has a part in the result.
//! Non-goals: what the condition is, and where in its block it stands.

use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use sqlparser::tokenizer::Location;

use super::analyse::{Analyser, Unparsed};
use super::scope::Scope;
use super::{env, guard};
use crate::sql::facts::{Schema, Spread, TableName, Use};
use crate::sql::lex::Token;
use crate::topology::Placement;

/// A relation whose rows have to be told apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Site {
    /// The token that begins its block: SELECT, UPDATE or DELETE.
    pub block: usize,
    /// The name its columns go by.
    pub called: String,
    pub table: TableName,
}

/// The sites of one statement that several shards answer, each for itself. Every row of such a statement is decided by a row of a
/// table in its outermost FROM, and rows of other sharded tables matter only with an equal key ([`Spread`]), so one site is
/// enough. What is written inside WITH is done whatever is read of it: there every relation is a site.
pub fn sites(text: &str, tokens: &[Token], params: u16, schema: &Schema<'_>) -> Result<Vec<Site>, Unparsed> {
    guard(text, tokens)?;
    let parsed = Parser::parse_sql(&PostgreSqlDialect {}, text);
    let mut statements = parsed.map_err(|_| Unparsed("weir's parser does not know its syntax"))?;
    let (Some(statement), true) = (statements.pop(), statements.is_empty()) else {
        return Err(Unparsed("it is not exactly one statement"));
    };
    let mut analyser = Analyser::new(schema, params);
    analyser.statement(&statement, &Scope::default(), &env::Env::default())?;
    if !(0..analyser.instances.len()).any(|index| analyser.is_sharded(index)) {
        return Ok(Vec::new());
    }
    let wanted = if analyser.writes_in_with { analyser.all() } else { analyser.first_of_core() }?;
    wanted.into_iter().map(|index| analyser.site(index, text, tokens)).collect()
}

impl Analyser<'_> {
    fn is_sharded(&self, index: usize) -> bool {
        matches!(self.schema.placement(&self.instances[index].table), Placement::Sharded { .. })
    }

    /// Every sharded relation that is read, or whose rows are changed.
    fn all(&self) -> Result<Vec<usize>, Unparsed> {
        let met = |index: &usize| self.is_sharded(*index) && self.instances[*index].usage != Use::Insert;
        let all: Vec<usize> = (0..self.instances.len()).filter(met).collect();
        if all.iter().any(|index| self.owners[self.instances[*index].owner].nullable) {
            return Err(Unparsed("it writes inside WITH, and has an outer join"));
        }
        Ok(all)
    }

    fn first_of_core(&self) -> Result<Vec<usize>, Unparsed> {
        let core = self.core_nodes().ok_or(Unparsed("no sharded table in it decides which rows there are"))?;
        let is_core = |index: &usize| {
            self.is_sharded(*index)
                && self.instances[*index].usage != Use::Insert
                && !self.owners[self.instances[*index].owner].nullable
                && self.instances[*index].called.is_some()
                && self.spread_of(*index, &core) == Spread::Core
        };
        let first = (0..self.instances.len()).find(is_core);
        Ok(vec![first.ok_or(Unparsed("it gives the columns of its table other names"))?])
    }

    fn site(&self, index: usize, text: &str, tokens: &[Token]) -> Result<Site, Unparsed> {
        let draft = &self.instances[index];
        let called = draft.called.clone().ok_or(Unparsed("it gives the columns of its table other names"))?;
        let offset = draft.block.and_then(|at| offset(text, at));
        let begins = |token: &Token| ["select", "update", "delete"].iter().any(|word| token.is_word(text, word));
        let block = offset.and_then(|offset| tokens.binary_search_by_key(&offset, |token| token.start as usize).ok());
        let block =
            block.filter(|block| begins(&tokens[*block])).ok_or(Unparsed("weir cannot tell its blocks apart"))?;
        Ok(Site { block, called, table: draft.table.clone() })
    }
}

/// The byte at which a line and column of the parser's stands; both count from 1, columns in characters.
fn offset(text: &str, at: Location) -> Option<usize> {
    let line = usize::try_from(at.line).ok()?.checked_sub(1)?;
    let column = usize::try_from(at.column).ok()?.checked_sub(1)?;
    let start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
    let (offset, _) = text.get(start..)?.char_indices().nth(column)?;
    Some(start + offset)
}
