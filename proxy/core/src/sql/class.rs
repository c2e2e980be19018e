//! What kind of statement this is, by our lexer alone: works for every statement Postgres has, also where the parser fails.
//!
//! Invariant: what ends, starts or changes a transaction or a session is classed exactly as Postgres's grammar reads it
//! (src/backend/parser/gram.y), or as [`Class::Other`]; never as something harmless.
//!
//! Non-goals: relations, columns and keys (the planner's facts), and whether the server will accept the statement.

mod ddl;
mod meaning;
mod set;

pub use set::canonical;

use super::cursor::Cursor;
use super::lex::{Token, TokenKind};

/// The kind of one statement, with what the session needs to know of it. Names are folded as Postgres folds them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Class {
    /// No token at all.
    Empty,
    /// BEGIN, START TRANSACTION.
    Begin(Modes),
    /// COMMIT, END; `chain` starts the next transaction at once.
    Commit {
        chain: bool,
    },
    /// ROLLBACK, ABORT.
    Rollback {
        chain: bool,
    },
    Savepoint(String),
    Release(String),
    RollbackTo(String),
    PrepareTransaction,
    CommitPrepared,
    RollbackPrepared,
    /// SET TRANSACTION, for this transaction only.
    SetTransaction(Modes),
    /// SET SESSION CHARACTERISTICS AS TRANSACTION: the defaults of later transactions.
    SetCharacteristics(Modes),
    /// SET CONSTRAINTS, for this transaction only.
    SetConstraints,
    /// SET in all its spellings; the name is the server's own (`timezone`, `client_encoding`, `role`, …), in lower case.
    Set {
        name: String,
        value: SetValue,
        scope: Scope,
    },
    /// RESET, and SET … TO DEFAULT of the session.
    Reset(Target),
    Show,
    Discard(Discard),
    /// SELECT without INTO.
    Select,
    Values,
    /// TABLE t.
    Table,
    Insert,
    Update,
    Delete,
    Merge,
    /// WITH …: the verb behind the CTEs; `writes` if that verb or one in a CTE changes data.
    With {
        verb: Verb,
        writes: bool,
    },
    /// SELECT … INTO t.
    SelectInto,
    Copy(Copy),
    Declare {
        name: String,
        hold: bool,
    },
    Fetch {
        name: String,
    },
    Move {
        name: String,
    },
    CloseCursor(Target),
    /// SQL PREPARE; `inner` is the index of the first token of the prepared statement.
    Prepare {
        name: String,
        inner: usize,
    },
    Execute {
        name: String,
    },
    Deallocate(Target),
    Listen(String),
    Unlisten(Target),
    Notify(String),
    Lock,
    /// `inner` is the index of the first token of the explained statement; only with `analyze` is it run.
    Explain {
        analyze: bool,
        inner: usize,
    },
    Call,
    Do,
    /// LOAD of a library into the server process.
    Load,
    Truncate,
    Ddl(Ddl),
    /// Not a statement this file knows, or one it cannot read to its end.
    Other,
}

/// The main verb of a statement that starts with WITH.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// SELECT, VALUES and TABLE.
    Select,
    SelectInto,
    Insert,
    Update,
    Delete,
    Merge,
}

/// Transaction modes as written; `None` leaves a mode to the session's default.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Modes {
    pub isolation: Option<Isolation>,
    pub read_only: Option<bool>,
    pub deferrable: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isolation {
    ReadUncommitted,
    ReadCommitted,
    RepeatableRead,
    Serializable,
}

impl Isolation {
    /// As `SHOW transaction_isolation` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Isolation::ReadUncommitted => "read uncommitted",
            Isolation::ReadCommitted => "read committed",
            Isolation::RepeatableRead => "repeatable read",
            Isolation::Serializable => "serializable",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetValue {
    /// SQL text that may stand behind `SET name TO` (behind `SET TIME ZONE` for `timezone`), with its strings re-quoted so
    /// that it reads the same under any `standard_conforming_strings`.
    Text(String),
    /// SET LOCAL … TO DEFAULT.
    Default,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    Session,
    /// To the end of the transaction.
    Local,
}

/// One thing by name, or all of its kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    Name(String),
    All,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Discard {
    All,
    Plans,
    Temp,
    Sequences,
}

/// COPY; `relation` is `None` for a query or what cannot be read as a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copy {
    pub direction: CopyDirection,
    pub endpoint: CopyEndpoint,
    pub relation: Option<CopyRelation>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyDirection {
    /// Into the table.
    From,
    /// Out of the table or query.
    To,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyEndpoint {
    /// The client sends.
    Stdin,
    /// The client receives.
    Stdout,
    File,
    Program,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyRelation {
    pub schema: Option<String>,
    pub name: String,
}

/// A statement that changes definitions, rights or storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ddl {
    /// False if Postgres refuses it in a transaction block.
    pub transactional: bool,
    /// Verb and object, such as `CREATE TABLE`; the verb alone for objects this file does not list.
    pub what: &'static str,
    /// CREATE TEMP …: a state of the session.
    pub temporary: bool,
}

/// Classes the one statement in `tokens` (a range of the tokens of `sql`; a trailing `;` is ignored).
pub fn classify(sql: &str, tokens: &[Token]) -> Class {
    let count = tokens.iter().rposition(|token| token.kind != TokenKind::Semicolon).map_or(0, |last| last + 1);
    let mut cursor = Cursor::new(sql, &tokens[..count]);
    if cursor.is_done() {
        return Class::Empty;
    }
    if cursor.sees_kind(TokenKind::LeftParen) {
        while cursor.eat_kind(TokenKind::LeftParen) {}
        return match cursor.word().as_deref() {
            Some("select") => select(sql, cursor.tokens),
            Some("values") => Class::Values,
            Some("table") => Class::Table,
            Some("with") => with(cursor),
            _ => Class::Other,
        };
    }
    let Some(verb) = cursor.word() else { return Class::Other };
    data(&verb, cursor)
        .or_else(|| transaction(&verb, cursor))
        .or_else(|| session(&verb, cursor))
        .or_else(|| ddl::ddl(&verb, cursor))
        .unwrap_or(Class::Other)
}

/// Does the statement lock rows (FOR UPDATE, FOR NO KEY UPDATE, FOR SHARE, FOR KEY SHARE) anywhere?
pub fn locks_rows(sql: &str, tokens: &[Token]) -> bool {
    (0..tokens.len()).any(|at| {
        let cursor = Cursor { sql, tokens, at };
        ["for update", "for no key update", "for share", "for key share"].iter().any(|lock| { cursor }.eat_all(lock))
    })
}

fn data(verb: &str, mut cursor: Cursor<'_>) -> Option<Class> {
    Some(match verb {
        "select" => select(cursor.sql, cursor.tokens),
        "insert" => Class::Insert,
        "update" => Class::Update,
        "delete" => Class::Delete,
        "merge" => Class::Merge,
        "values" => Class::Values,
        "table" => Class::Table,
        "with" => with(cursor),
        "copy" => ddl::copy(&mut cursor).map_or(Class::Other, Class::Copy),
        "call" => Class::Call,
        "do" => Class::Do,
        "lock" => Class::Lock,
        "truncate" => Class::Truncate,
        "explain" => explain(&mut cursor),
        _ => return None,
    })
}

/// INTO is reserved: in a query it is a column's name behind AS or a point only, and INSERT's or MERGE's own word.
fn select(sql: &str, tokens: &[Token]) -> Class {
    let into = tokens.windows(2).any(|pair| {
        let own = ["as", "insert", "merge"].iter().any(|word| pair[0].is_word(sql, word));
        pair[1].is_word(sql, "into") && !own && pair[0].kind != TokenKind::Dot
    });
    if into { Class::SelectInto } else { Class::Select }
}

fn with(mut cursor: Cursor<'_>) -> Class {
    cursor.eat("recursive");
    let start = cursor.at;
    let base = cursor.peek().map_or(0, |token| token.depth);
    let (sql, tokens) = (cursor.sql, cursor.tokens);
    let writes_at =
        |at: usize| ["insert", "update", "delete", "merge"].iter().any(|verb| tokens[at].is_word(sql, verb));
    // A CTE's name may be any of the verbs but stands behind WITH, RECURSIVE or a comma; SEARCH and CYCLE name columns.
    let names = |token: Token| {
        token.kind == TokenKind::Comma || ["by", "set", "cycle", "using"].iter().any(|word| token.is_word(sql, word))
    };
    let main = (start + 1..tokens.len()).filter(|&at| tokens[at].depth == base && !names(tokens[at - 1])).find(|&at| {
        let parens = tokens[at].kind == TokenKind::LeftParen && tokens[at - 1].kind == TokenKind::RightParen;
        let reads = ["select", "values", "table"].iter().any(|verb| tokens[at].is_word(sql, verb));
        parens || reads || writes_at(at)
    });
    let Some(main) = main else { return Class::Other };
    let cte_writes = (start + 1..main).any(|at| tokens[at - 1].kind == TokenKind::LeftParen && writes_at(at));
    let verb = match tokens[main].text(sql).to_ascii_lowercase().as_str() {
        "insert" => Verb::Insert,
        "update" => Verb::Update,
        "delete" => Verb::Delete,
        "merge" => Verb::Merge,
        _ if select(sql, &tokens[main..]) == Class::SelectInto => Verb::SelectInto,
        _ => Verb::Select,
    };
    Class::With { verb, writes: cte_writes || verb != Verb::Select }
}

/// `EXPLAIN [ANALYZE] [VERBOSE] statement` or `EXPLAIN (option, …) statement`.
fn explain(cursor: &mut Cursor<'_>) -> Class {
    let mut analyze = false;
    let starts_query = ["select", "values", "with", "table"].iter().any(|verb| cursor.sees_at(1, verb));
    let nested = cursor.tokens.get(cursor.at + 1).is_some_and(|token| token.kind == TokenKind::LeftParen);
    if cursor.sees_kind(TokenKind::LeftParen) && !starts_query && !nested {
        let mut options = *cursor;
        cursor.skip_parens();
        options.tokens = &options.tokens[..cursor.at];
        while !options.is_done() {
            options.at += 1;
            if options.eat_any(&["analyze", "analyse"]) {
                let value = options.peek().map(|token| token.text(options.sql).trim_matches('\'').to_ascii_lowercase());
                analyze = !matches!(value.as_deref(), Some("false" | "off" | "0"));
            }
        }
    } else {
        analyze = cursor.eat_any(&["analyze", "analyse"]);
        cursor.eat("verbose");
    }
    if cursor.is_done() { Class::Other } else { Class::Explain { analyze, inner: cursor.at } }
}

fn transaction(verb: &str, mut cursor: Cursor<'_>) -> Option<Class> {
    let cursor = &mut cursor;
    let class = match verb {
        "begin" => {
            cursor.eat_any(&["work", "transaction"]);
            modes(cursor).map(Class::Begin)
        }
        "start" if cursor.eat("transaction") => modes(cursor).map(Class::Begin),
        "commit" if cursor.eat("prepared") => gid(cursor, Class::CommitPrepared),
        "rollback" if cursor.eat("prepared") => gid(cursor, Class::RollbackPrepared),
        "prepare" if cursor.sees("transaction") && cursor.tokens.len() == 3 => {
            cursor.at += 1;
            gid(cursor, Class::PrepareTransaction)
        }
        "commit" | "end" => {
            cursor.eat_any(&["work", "transaction"]);
            chain(cursor).map(|chain| Class::Commit { chain })
        }
        "abort" => {
            cursor.eat_any(&["work", "transaction"]);
            chain(cursor).map(|chain| Class::Rollback { chain })
        }
        "rollback" => {
            cursor.eat_any(&["work", "transaction"]);
            if cursor.eat("to") {
                savepoint(cursor).map(Class::RollbackTo)
            } else {
                chain(cursor).map(|chain| Class::Rollback { chain })
            }
        }
        "savepoint" => cursor.name().map(Class::Savepoint),
        "release" => savepoint(cursor).map(Class::Release),
        _ => return None,
    };
    Some(class.filter(|_| cursor.is_done()).unwrap_or(Class::Other))
}

/// `[SAVEPOINT] name`, where the name may be `savepoint` itself.
fn savepoint(cursor: &mut Cursor<'_>) -> Option<String> {
    if cursor.sees("savepoint") && cursor.at + 1 < cursor.tokens.len() {
        cursor.at += 1;
    }
    cursor.name()
}

fn gid(cursor: &mut Cursor<'_>, class: Class) -> Option<Class> {
    let token = cursor.peek()?;
    cursor.at += 1;
    super::word::string_value(cursor.sql, token).map(|_| class)
}

/// `[AND [NO] CHAIN]`
fn chain(cursor: &mut Cursor<'_>) -> Option<bool> {
    if !cursor.eat("and") {
        return Some(false);
    }
    let chain = !cursor.eat("no");
    cursor.eat("chain").then_some(chain)
}

/// transaction_mode_list_or_empty, to the end of the statement. A later mode wins, as in Postgres.
fn modes(cursor: &mut Cursor<'_>) -> Option<Modes> {
    let mut modes = Modes::default();
    while !cursor.is_done() {
        if cursor.eat_all("isolation level") {
            modes.isolation = Some(match () {
                () if cursor.eat_all("read uncommitted") => Isolation::ReadUncommitted,
                () if cursor.eat_all("read committed") => Isolation::ReadCommitted,
                () if cursor.eat_all("repeatable read") => Isolation::RepeatableRead,
                () if cursor.eat("serializable") => Isolation::Serializable,
                () => return None,
            });
        } else if cursor.eat_all("read only") {
            modes.read_only = Some(true);
        } else if cursor.eat_all("read write") {
            modes.read_only = Some(false);
        } else if cursor.eat("deferrable") {
            modes.deferrable = Some(true);
        } else if cursor.eat_all("not deferrable") {
            modes.deferrable = Some(false);
        } else {
            return None;
        }
        if cursor.eat_kind(TokenKind::Comma) && cursor.is_done() {
            return None;
        }
    }
    Some(modes)
}

fn session(verb: &str, mut cursor: Cursor<'_>) -> Option<Class> {
    let cursor = &mut cursor;
    let class = match verb {
        "set" => set::set(cursor),
        "reset" => set::reset(cursor).map(Class::Reset),
        "show" => Some(Class::Show).inspect(|_| cursor.at = cursor.tokens.len()),
        "discard" => discard(cursor).map(Class::Discard),
        "declare" => declare(cursor),
        "fetch" => last_name(cursor).map(|name| Class::Fetch { name }),
        "move" => last_name(cursor).map(|name| Class::Move { name }),
        "close" => target(cursor, "all").map(Class::CloseCursor),
        "prepare" => prepare(cursor),
        "execute" => cursor.name().map(|name| {
            cursor.skip_parens();
            Class::Execute { name }
        }),
        "deallocate" => {
            if cursor.sees("prepare") && cursor.at + 1 < cursor.tokens.len() {
                cursor.at += 1;
            }
            target(cursor, "all").map(Class::Deallocate)
        }
        "listen" => cursor.name().map(Class::Listen),
        "unlisten" => {
            let star = cursor.peek().is_some_and(|token| token.text(cursor.sql) == "*");
            cursor.at += usize::from(star);
            if star { Some(Target::All) } else { cursor.name().map(Target::Name) }.map(Class::Unlisten)
        }
        "notify" => cursor.name().map(|name| {
            cursor.at = cursor.tokens.len();
            Class::Notify(name)
        }),
        "load" => Some(Class::Load).inspect(|_| cursor.at = cursor.tokens.len()),
        _ => return None,
    };
    Some(class.filter(|_| cursor.is_done()).unwrap_or(Class::Other))
}

fn target(cursor: &mut Cursor<'_>, all: &str) -> Option<Target> {
    if cursor.eat(all) { Some(Target::All) } else { cursor.name().map(Target::Name) }
}

fn discard(cursor: &mut Cursor<'_>) -> Option<Discard> {
    match cursor.word()?.as_str() {
        "all" => Some(Discard::All),
        "plans" => Some(Discard::Plans),
        "temp" | "temporary" => Some(Discard::Temp),
        "sequences" => Some(Discard::Sequences),
        _ => None,
    }
}

/// `DECLARE name options CURSOR [WITH HOLD | WITHOUT HOLD] FOR query`
fn declare(cursor: &mut Cursor<'_>) -> Option<Class> {
    let name = cursor.name()?;
    while cursor.eat_any(&["binary", "asensitive", "insensitive", "scroll", "no"]) {}
    if !cursor.eat("cursor") {
        return None;
    }
    let hold = cursor.eat_all("with hold");
    let _ = hold || cursor.eat_all("without hold");
    cursor.eat("for").then(|| {
        cursor.at = cursor.tokens.len();
        Class::Declare { name, hold }
    })
}

/// FETCH and MOVE end with the cursor's name whatever stands in front.
fn last_name(cursor: &mut Cursor<'_>) -> Option<String> {
    let last = cursor.tokens.len() - 1;
    cursor.at = cursor.at.max(last);
    cursor.name()
}

/// `PREPARE name [(types)] AS statement`
fn prepare(cursor: &mut Cursor<'_>) -> Option<Class> {
    let name = cursor.name()?;
    cursor.skip_parens();
    let inner = cursor.eat("as").then_some(cursor.at)?;
    let class = Class::Prepare { name, inner };
    cursor.at = cursor.tokens.len();
    (inner < cursor.at).then_some(class)
}

#[cfg(test)]
mod tests;
