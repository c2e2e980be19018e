//! Statements about definitions, rights and storage, and COPY.
//!
//! Invariant: what Postgres refuses in a transaction block (PreventInTransactionBlock in src/backend) is marked so wherever
//! the text shows it; REINDEX and CLUSTER of a partitioned table cannot be told from text and count as transactional.

use super::{Class, Copy, CopyDirection, CopyEndpoint, CopyRelation, Ddl};
use crate::sql::cursor::Cursor;
use crate::sql::lex::TokenKind;

/// Object words behind CREATE, ALTER and DROP, and the three tags. The first that matches wins.
const OBJECTS: [(&str, [&str; 3]); 36] = [
    ("table", ["CREATE TABLE", "ALTER TABLE", "DROP TABLE"]),
    ("index", ["CREATE INDEX", "ALTER INDEX", "DROP INDEX"]),
    ("view", ["CREATE VIEW", "ALTER VIEW", "DROP VIEW"]),
    ("materialized view", ["CREATE MATERIALIZED VIEW", "ALTER MATERIALIZED VIEW", "DROP MATERIALIZED VIEW"]),
    ("sequence", ["CREATE SEQUENCE", "ALTER SEQUENCE", "DROP SEQUENCE"]),
    ("schema", ["CREATE SCHEMA", "ALTER SCHEMA", "DROP SCHEMA"]),
    ("database", ["CREATE DATABASE", "ALTER DATABASE", "DROP DATABASE"]),
    ("tablespace", ["CREATE TABLESPACE", "ALTER TABLESPACE", "DROP TABLESPACE"]),
    ("function", ["CREATE FUNCTION", "ALTER FUNCTION", "DROP FUNCTION"]),
    ("procedure", ["CREATE PROCEDURE", "ALTER PROCEDURE", "DROP PROCEDURE"]),
    ("routine", ["CREATE ROUTINE", "ALTER ROUTINE", "DROP ROUTINE"]),
    ("aggregate", ["CREATE AGGREGATE", "ALTER AGGREGATE", "DROP AGGREGATE"]),
    ("trigger", ["CREATE TRIGGER", "ALTER TRIGGER", "DROP TRIGGER"]),
    ("event trigger", ["CREATE EVENT TRIGGER", "ALTER EVENT TRIGGER", "DROP EVENT TRIGGER"]),
    ("rule", ["CREATE RULE", "ALTER RULE", "DROP RULE"]),
    ("type", ["CREATE TYPE", "ALTER TYPE", "DROP TYPE"]),
    ("domain", ["CREATE DOMAIN", "ALTER DOMAIN", "DROP DOMAIN"]),
    ("cast", ["CREATE CAST", "ALTER CAST", "DROP CAST"]),
    ("collation", ["CREATE COLLATION", "ALTER COLLATION", "DROP COLLATION"]),
    ("conversion", ["CREATE CONVERSION", "ALTER CONVERSION", "DROP CONVERSION"]),
    ("operator", ["CREATE OPERATOR", "ALTER OPERATOR", "DROP OPERATOR"]),
    ("extension", ["CREATE EXTENSION", "ALTER EXTENSION", "DROP EXTENSION"]),
    ("language", ["CREATE LANGUAGE", "ALTER LANGUAGE", "DROP LANGUAGE"]),
    ("policy", ["CREATE POLICY", "ALTER POLICY", "DROP POLICY"]),
    ("role", ["CREATE ROLE", "ALTER ROLE", "DROP ROLE"]),
    ("user mapping", ["CREATE USER MAPPING", "ALTER USER MAPPING", "DROP USER MAPPING"]),
    ("user", ["CREATE ROLE", "ALTER ROLE", "DROP ROLE"]),
    ("group", ["CREATE ROLE", "ALTER ROLE", "DROP ROLE"]),
    ("server", ["CREATE SERVER", "ALTER SERVER", "DROP SERVER"]),
    ("foreign table", ["CREATE FOREIGN TABLE", "ALTER FOREIGN TABLE", "DROP FOREIGN TABLE"]),
    ("foreign data", ["CREATE FOREIGN DATA WRAPPER", "ALTER FOREIGN DATA WRAPPER", "DROP FOREIGN DATA WRAPPER"]),
    ("publication", ["CREATE PUBLICATION", "ALTER PUBLICATION", "DROP PUBLICATION"]),
    ("subscription", ["CREATE SUBSCRIPTION", "ALTER SUBSCRIPTION", "DROP SUBSCRIPTION"]),
    ("statistics", ["CREATE STATISTICS", "ALTER STATISTICS", "DROP STATISTICS"]),
    ("text search", ["CREATE TEXT SEARCH", "ALTER TEXT SEARCH", "DROP TEXT SEARCH"]),
    ("owned", ["CREATE OWNED", "ALTER OWNED", "DROP OWNED"]),
];

/// Words that may stand between the verb and the object.
const MODIFIERS: [&str; 14] = [
    "or",
    "replace",
    "global",
    "local",
    "temp",
    "temporary",
    "unlogged",
    "unique",
    "trusted",
    "procedural",
    "constraint",
    "recursive",
    "default",
    "access",
];

/// `None` if `verb`, which has been read, starts no statement of this kind.
pub(super) fn ddl(verb: &str, mut cursor: Cursor<'_>) -> Option<Class> {
    let ddl = match verb {
        "create" => of_object(0, "CREATE", &mut cursor),
        "alter" => of_object(1, "ALTER", &mut cursor),
        "drop" => of_object(2, "DROP", &mut cursor),
        "comment" => simple("COMMENT"),
        "grant" => simple("GRANT"),
        "revoke" => simple("REVOKE"),
        "security" => simple("SECURITY LABEL"),
        "refresh" => simple("REFRESH MATERIALIZED VIEW"),
        "import" => simple("IMPORT FOREIGN SCHEMA"),
        "reassign" => simple("REASSIGN OWNED"),
        "analyze" | "analyse" => simple("ANALYZE"),
        "checkpoint" => simple("CHECKPOINT"),
        "vacuum" => Ddl { transactional: false, ..simple("VACUUM") },
        "cluster" => Ddl { transactional: clusters_one(cursor), ..simple("CLUSTER") },
        "reindex" => Ddl { transactional: !reindexes_apart(cursor), ..simple("REINDEX") },
        _ => return None,
    };
    Some(Class::Ddl(ddl))
}

fn simple(what: &'static str) -> Ddl {
    Ddl { transactional: true, what, temporary: false }
}

fn of_object(verb: usize, bare: &'static str, cursor: &mut Cursor<'_>) -> Ddl {
    let mut temporary = false;
    while MODIFIERS.iter().any(|word| cursor.sees(word)) {
        temporary |= cursor.sees("temp") || cursor.sees("temporary");
        cursor.at += 1;
    }
    let system = verb == 1 && cursor.sees("system");
    let what = OBJECTS.iter().find(|(words, _)| cursor.eat_all(words)).map_or(bare, |(_, tags)| tags[verb]);
    let concurrently = cursor.tokens.iter().any(|token| token.is_word(cursor.sql, "concurrently"));
    let apart = match what {
        "CREATE INDEX" | "DROP INDEX" | "ALTER TABLE" => concurrently,
        "CREATE DATABASE" | "DROP DATABASE" | "CREATE TABLESPACE" | "DROP TABLESPACE" => true,
        // A new home for the database; everything else ALTER DATABASE does is transactional.
        "ALTER DATABASE" => cursor.sees_at(1, "set") && cursor.sees_at(2, "tablespace"),
        "CREATE SUBSCRIPTION" | "ALTER SUBSCRIPTION" | "DROP SUBSCRIPTION" => true,
        _ => system,
    };
    Ddl { transactional: !apart, what: if system { "ALTER SYSTEM" } else { what }, temporary: temporary && verb == 0 }
}

/// CLUSTER without a table clusters the whole database, a transaction per table.
fn clusters_one(mut cursor: Cursor<'_>) -> bool {
    cursor.skip_parens();
    cursor.eat("verbose");
    !cursor.is_done()
}

/// `REINDEX [(options)] {INDEX | TABLE | SCHEMA | DATABASE | SYSTEM} [CONCURRENTLY] [name]`
fn reindexes_apart(mut cursor: Cursor<'_>) -> bool {
    let concurrently = cursor.tokens.iter().any(|token| token.is_word(cursor.sql, "concurrently"));
    cursor.skip_parens();
    concurrently || cursor.eat_any(&["schema", "database", "system"])
}

/// `COPY [BINARY] table [(columns)] | (query)  FROM | TO  [PROGRAM] 'file' | STDIN | STDOUT …`, behind COPY.
pub(super) fn copy(cursor: &mut Cursor<'_>) -> Option<Copy> {
    let relation = if cursor.sees_kind(TokenKind::LeftParen) {
        None
    } else {
        // A reserved word: a table of this name has to be quoted.
        cursor.eat("binary");
        copy_relation(cursor)
    };
    cursor.skip_parens();
    let direction = match () {
        () if cursor.eat("from") => CopyDirection::From,
        () if cursor.eat("to") => CopyDirection::To,
        () => return None,
    };
    // gram.y takes STDIN and STDOUT for each other; the direction decides.
    let endpoint = match direction {
        _ if cursor.eat("program") => CopyEndpoint::Program,
        CopyDirection::From if cursor.eat_any(&["stdin", "stdout"]) => CopyEndpoint::Stdin,
        CopyDirection::To if cursor.eat_any(&["stdin", "stdout"]) => CopyEndpoint::Stdout,
        _ => CopyEndpoint::File,
    };
    Some(Copy { direction, endpoint, relation })
}

fn copy_relation(cursor: &mut Cursor<'_>) -> Option<CopyRelation> {
    let mut schema = None;
    let mut name = cursor.name()?;
    while cursor.eat_kind(TokenKind::Dot) {
        schema = Some(std::mem::replace(&mut name, cursor.name()?));
    }
    Some(CopyRelation { schema, name })
}
