//! The same bytes to Postgres and to weir: the replies must be the same frames, in the same order, with the same contents.
//!
//! Each script is sent to a server directly, then through weir in front of that server alone, then through weir with two
//! shards (tables that are not declared live on the home shard). Only what names a place or a process may differ: file, line
//! and routine of an error, process numbers, and the name under which the server has a statement; and ParameterStatus and
//! NotificationResponse, which may come at any time, may come at another one.
//!
//! `SCRIPT=name` plays one script alone.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use weir_harness::Tier;
use weir_wire::backend::tag as server;
use weir_wire::frontend::{
    Execute, Object, Parse, Target, put_copy_fail, put_flush, put_query, put_sync, put_terminate, tag,
};
use weir_wire::{frame, row};

use crate::raw::Raw;

/// What a client does, in order. Messages are gathered and sent by the next reading step.
#[derive(Clone, Debug)]
pub enum Do {
    /// Query.
    Q(&'static str),
    /// Parse: name and text.
    P(&'static str, &'static str),
    /// Bind: portal, statement, text parameters.
    B(&'static str, &'static str, &'static [&'static str]),
    /// Bind with all results in binary form.
    Binary(&'static str, &'static str, &'static [&'static str]),
    /// Describe a statement or a portal.
    DS(&'static str),
    DP(&'static str),
    /// Execute: portal and most rows.
    E(&'static str, i32),
    /// Close a statement or a portal.
    CS(&'static str),
    CP(&'static str),
    Sync,
    Flush,
    Data(&'static str),
    CopyDone,
    CopyFail,
    Terminate,
    /// FunctionCall of an oid with text arguments.
    Call(u32, &'static [&'static str]),
    /// A whole frame as it is.
    Frame(u8, &'static [u8]),
    /// Read up to this many ReadyForQuery.
    Ready(usize),
    /// Read up to and including a frame with this tag.
    Until(char),
    /// Read until the server closes the connection.
    Closed,
    /// Run on another connection, directly on the server.
    Elsewhere(&'static str),
    /// Nothing may come for a moment.
    Quiet,
}

use Do::*;

/// A script by name.
type Script = (&'static str, &'static [Do]);

/// What weir refuses over several shards, as the guide for developers says.
const ONE_SHARD_ONLY: &[&str] = &[
    "a cursor as a portal",
    "pipelined control",
    "control half in texts",
    "settings in texts",
    "prepare a failed transaction",
    "what a transaction's end says",
    "prepare",
    "execute and cursors described",
    "listen",
    "listen, extended",
    "prepare transaction",
];

#[rustfmt::skip]
const SIMPLE: &[Script] = &[
    ("empty", &[Q(""), Ready(1), Q(" ; ;"), Ready(1), Q("-- nothing"), Ready(1), Q("/* nothing */"), Ready(1)]),
    ("several", &[Q("SELECT 1; SELECT 'two'; SELECT 3 WHERE false"), Ready(1), Q("SELECT 1; SELEC 2; SELECT 3"), Ready(1)]),
    ("error in the middle", &[Q("INSERT INTO t VALUES (1, 'a'); SELECT 1 / 0; SELECT 2"), Ready(1),
        Q("SELECT count(*) FROM t"), Ready(1)]),
    ("transaction", &[Q("BEGIN"), Ready(1), Q("BEGIN"), Ready(1), Q("INSERT INTO t VALUES (1, 'a')"), Ready(1),
        Q("SAVEPOINT s"), Ready(1), Q("SELECT 1/0"), Ready(1), Q("SELECT 1"), Ready(1), Q("ROLLBACK TO s"), Ready(1),
        Q("SELECT * FROM t"), Ready(1), Q("RELEASE s"), Ready(1), Q("RELEASE s"), Ready(1), Q("COMMIT"), Ready(1),
        Q("COMMIT"), Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("control without a transaction", &[Q("SAVEPOINT s"), Ready(1), Q("ROLLBACK TO s"), Ready(1), Q("RELEASE s"),
        Ready(1), Q("SET LOCAL work_mem = '1MB'"), Ready(1), Q("SET TRANSACTION READ ONLY"), Ready(1),
        Q("SET CONSTRAINTS ALL DEFERRED"), Ready(1), Q("COMMIT AND CHAIN"), Ready(1), Q("ROLLBACK AND CHAIN"), Ready(1)]),
    ("forms of control", &[Q("START TRANSACTION READ ONLY"), Ready(1), Q("INSERT INTO t VALUES (1)"), Ready(1), Q("END"),
        Ready(1), Q("begin work"), Ready(1), Q("abort"), Ready(1), Q("BEGIN ISOLATION LEVEL SERIALIZABLE"), Ready(1),
        Q("SHOW transaction_isolation"), Ready(1), Q("COMMIT AND CHAIN"), Ready(1), Q("SHOW transaction_isolation"),
        Ready(1), Q("ROLLBACK AND NO CHAIN"), Ready(1)]),
    ("control in one text", &[Q("BEGIN; SELECT 1"), Ready(1), Q("SELECT 2; COMMIT"), Ready(1),
        Q("BEGIN; SELECT 1/0; COMMIT"), Ready(1), Q("ROLLBACK; SELECT 3"), Ready(1), Q("SELECT 1; COMMIT; SELECT 2"),
        Ready(1)]),
    ("control half in texts", &[Q("BEGIN; SAVEPOINT s; INSERT INTO t VALUES (1)"), Ready(1), Q("ROLLBACK TO s"), Ready(1),
        Q("SELECT count(*) FROM t"), Ready(1), Q("RELEASE s; RELEASE s"), Ready(1), Q("ROLLBACK TO s"), Ready(1), Q("ROLLBACK"),
        Ready(1)]),
    ("settings in texts", &[Q("SET work_mem = '1MB'; SELECT 1"), Ready(1), Q("SHOW work_mem"), Ready(1),
        Q("BEGIN; SET work_mem = '2MB'; ROLLBACK"), Ready(1), Q("SHOW work_mem"), Ready(1),
        Q("BEGIN; SET work_mem = '3MB'; COMMIT"), Ready(1), Q("SHOW work_mem"), Ready(1), Q("SET work_mem = '4MB'; SELECT 1/0"),
        Ready(1), Q("SHOW work_mem"), Ready(1), Q("SET work_mem = '5MB'; RESET work_mem; SELECT 1"), Ready(1),
        Q("SHOW work_mem"), Ready(1), Q("BEGIN"), Ready(1), Q("SET work_mem = '6MB'"), Ready(1),
        Q("SHOW work_mem; ROLLBACK"), Ready(1), Q("SHOW work_mem"), Ready(1)]),
    ("date styles", &[Q("SET datestyle TO 'SQL'"), Ready(1), Q("SET datestyle TO dmy"), Ready(1), Q("SHOW datestyle"), Ready(1),
        Q("SET datestyle TO iso"), Ready(1), Q("SHOW datestyle"), Ready(1), Q("SELECT '1/2/2003'::date"), Ready(1),
        Q("RESET datestyle"), Ready(1), Q("SHOW datestyle"), Ready(1)]),
    ("what a transaction's end says", &[
        Q("CREATE OR REPLACE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''at last''; RETURN new; END'"),
        Ready(1), Q("CREATE TEMP TABLE told (a int)"), Ready(1),
        Q("CREATE CONSTRAINT TRIGGER tell AFTER INSERT ON told DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION tell()"),
        Ready(1), Q("BEGIN"), Ready(1), Q("INSERT INTO told VALUES (1)"), Ready(1), Q("COMMIT"), Ready(1)]),
    ("prepare a failed transaction", &[Q("BEGIN"), Ready(1), Q("SELECT 1/0"), Ready(1), Q("SELEC 1"), Ready(1),
        Q("PREPARE TRANSACTION 'x'"), Ready(1), Q("SELECT 1"), Ready(1)]),
    ("settings", &[Q("SET application_name = 'me'"), Ready(1), Q("SHOW application_name"), Ready(1),
        Q("SET nonsense = 1"), Ready(1), Q("SET work_mem = 'much'"), Ready(1), Q("RESET application_name"), Ready(1),
        Q("SET TIME ZONE 'Asia/Tokyo'"), Ready(1), Q("SHOW timezone"), Ready(1), Q("RESET ALL"), Ready(1),
        Q("SHOW nonsense"), Ready(1)]),
    ("notices", &[
        Q("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two' USING HINT = 'h', DETAIL = 'd', ERRCODE = '01234'; END $$"),
        Ready(1), Q("DROP TABLE IF EXISTS never"), Ready(1)]),
    ("prepare transaction", &[Q("PREPARE TRANSACTION 'x'"), Ready(1), Q("BEGIN"), Ready(1), Q("INSERT INTO t VALUES (1)"),
        Ready(1), Q("PREPARE TRANSACTION 'x'"), Ready(1), Q("SELECT count(*) FROM t"), Ready(1),
        Q("ROLLBACK PREPARED 'x'"), Ready(1), Q("COMMIT PREPARED 'x'"), Ready(1)]),
    ("syntax", &[Q("SELEC 1"), Ready(1), Q("SELECT * FROM nowhere"), Ready(1), Q("SELECT nothing FROM t"), Ready(1),
        Q("SELECT 'open"), Ready(1), Q("SELECT $1"), Ready(1)]),
    ("binary cursor", &[Q("BEGIN"), Ready(1), Q("DECLARE c BINARY CURSOR FOR SELECT 1::int4"), Ready(1),
        Q("FETCH 1 FROM c"), Ready(1), Q("CLOSE c"), Ready(1), Q("CLOSE c"), Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("prepare", &[Q("PREPARE p AS SELECT $1::int"), Ready(1), Q("EXECUTE p(4)"), Ready(1), Q("PREPARE p AS SELECT 1"),
        Ready(1), Q("DEALLOCATE p"), Ready(1), Q("EXECUTE p(4)"), Ready(1), Q("DEALLOCATE p"), Ready(1),
        Q("DEALLOCATE ALL"), Ready(1)]),
];

#[rustfmt::skip]
const EXTENDED: &[Script] = &[
    ("one", &[P("", "SELECT $1::int + 1"), B("", "", &["41"]), DP(""), E("", 0), Sync, Ready(1)]),
    ("binary", &[P("s", "SELECT $1::int4, 'x'::text, null::int8"), Binary("", "s", &["41"]), DP(""), E("", 0), Sync,
        Ready(1)]),
    ("empty", &[P("", ""), DS(""), B("", "", &[]), DP(""), E("", 0), Sync, Ready(1), P("e", "-- nothing"),
        B("", "e", &[]), E("", 0), Sync, Ready(1)]),
    ("only sync", &[Sync, Sync, Sync, Ready(3)]),
    ("several texts", &[P("", "SELECT 1; SELECT 2"), Sync, Ready(1)]),
    ("describe", &[P("s", "SELECT $1::int AS a, $2 || 'x' AS b FROM t"), DS("s"), P("u", "UPDATE t SET a = $1"), DS("u"),
        DS("nothing"), Sync, Ready(1), DP("nothing"), Sync, Ready(1)]),
    ("describe all", &[P("", "INSERT INTO t VALUES ($1, $2) RETURNING b"), DS(""), B("", "", &["1", "x"]), DP(""),
        E("", 0), DP(""), Sync, Ready(1)]),
    ("describe control", &[P("b", "BEGIN"), DS("b"), P("c", "COMMIT"), DS("c"), P("st", "SET application_name = 'x'"),
        DS("st"), P("sh", "SHOW server_version"), DS("sh"), Sync, Ready(1), B("", "b", &[]), DP(""), E("", 0),
        B("", "sh", &[]), DP(""), E("", 0), Sync, Ready(1), B("", "st", &[]), DP(""), E("", 0), Sync, Ready(1),
        B("", "c", &[]), DP(""), E("", 0), Sync, Ready(1)]),
    ("describe utilities", &[P("d", "DISCARD ALL"), DS("d"), P("r", "RESET ALL"), DS("r"), P("l", "LISTEN x"), DS("l"),
        P("sp", "SAVEPOINT s"), DS("sp"), P("x", "DEALLOCATE ALL"), DS("x"), P("ex", "EXPLAIN (COSTS OFF) SELECT 1"),
        DS("ex"), P("cp", "COPY t TO STDOUT"), DS("cp"), P("ct", "CREATE TABLE never (a int)"), DS("ct"),
        P("n", "NOTIFY x"), DS("n"), P("v", "VALUES (1, $1::text)"), DS("v"), P("tt", "TABLE t"), DS("tt"), Sync, Ready(1)]),
    ("fetch of a cursor", &[P("", "BEGIN"), B("", "", &[]), E("", 0),
        P("", "DECLARE c CURSOR FOR SELECT generate_series(1, 3)"), B("", "", &[]), E("", 0), P("f", "FETCH 2 FROM c"),
        DS("f"), B("", "f", &[]), DP(""), E("", 0), Sync, Ready(1), P("", "MOVE 1 FROM c"), DS(""), B("", "", &[]),
        E("", 0), Sync, Ready(1), P("", "CLOSE c"), B("", "", &[]), E("", 0), Sync, Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("pipelined control", &[P("", "BEGIN"), B("", "", &[]), E("", 0), P("", "SELECT 1/$1::int"), B("", "", &["0"]), DP(""),
        E("", 0), Sync, Ready(1), P("", "SELECT 2"), B("", "", &[]), E("", 0), Sync, Ready(1), P("", "ROLLBACK"), B("", "", &[]),
        E("", 0), P("", "SELECT 3"), B("", "", &[]), E("", 0), Sync, Ready(1), P("", "SET work_mem = '7MB'"), B("", "", &[]),
        E("", 0), P("", "SHOW work_mem"), B("", "", &[]), E("", 0), Sync, Ready(1), Q("SHOW work_mem"), Ready(1)]),
    ("a cursor as a portal", &[Q("BEGIN"), Ready(1), Q("DECLARE c CURSOR FOR SELECT generate_series(1, 3)"), Ready(1), DP("c"),
        E("c", 2), Sync, Ready(1), DP("d"), Sync, Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("parts", &[Q("BEGIN"), Ready(1), P("", "SELECT generate_series(1, 5)"), B("p", "", &[]), E("p", 2), Sync, Ready(1),
        E("p", 2), Flush, Until('s'), E("p", 0), E("p", 0), Sync, Ready(1), Q("COMMIT"), Ready(1), E("p", 0), Sync,
        Ready(1)]),
    ("parts outside a transaction", &[P("", "SELECT generate_series(1, 5)"), B("p", "", &[]), E("p", 2), E("p", 1), Flush,
        Until('s'), Until('s'), E("p", 1), Flush, Until('s'), Sync, Ready(1), E("p", 0), Sync, Ready(1)]),
    ("exactly all rows", &[Q("BEGIN"), Ready(1), P("", "SELECT generate_series(1, 2)"), B("p", "", &[]), E("p", 2),
        E("p", 2), E("p", 2), Sync, Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("flush after each", &[P("s", "SELECT $1::text"), Flush, Until('1'), DS("s"), Flush, Until('T'), B("", "s", &["v"]),
        Flush, Until('2'), DP(""), Flush, Until('T'), E("", 0), Flush, Until('C'), Sync, Ready(1)]),
    ("names", &[P("a", "SELECT 1"), P("a", "SELECT 2"), Sync, Ready(1), P("a", "SELECT 3"), Sync, Ready(1), CS("a"),
        CS("a"), P("a", "SELECT 4"), B("", "a", &[]), E("", 0), Sync, Ready(1), B("x", "a", &[]), B("x", "a", &[]), Sync,
        Ready(1), B("", "nothing", &[]), Sync, Ready(1), E("nothing", 0), Sync, Ready(1), CP("nothing"), CS("nothing"),
        Sync, Ready(1)]),
    ("unnamed ends with a query", &[P("", "SELECT 1"), Sync, Ready(1), Q("SELECT 2"), Ready(1), B("", "", &[]), Sync,
        Ready(1)]),
    ("unnamed parse fails", &[P("", "SELECT 1"), Sync, Ready(1), P("", "SELEC"), Sync, Ready(1), B("", "", &[]), E("", 0),
        Sync, Ready(1)]),
    ("parameters", &[P("s", "SELECT $1::int, $2::int"), B("", "s", &["1"]), Sync, Ready(1), B("", "s", &["x", "1"]), Sync,
        Ready(1), B("", "s", &["1", "2"]), E("", 0), Sync, Ready(1)]),
    ("error skips to sync", &[P("a", "SELECT 1/$1::int"), B("", "a", &["0"]), E("", 0), P("b", "SELECT 2"),
        B("", "a", &["1"]), E("", 0), Sync, P("c", "SELECT 3"), Sync, Ready(2), DS("b"), Sync, Ready(1), DS("c"), Sync,
        Ready(1)]),
    ("close after an error is skipped", &[P("a", "SELECT 1"), P("b", "SELECT 1/$1::int"), Sync, Ready(1),
        B("", "b", &["0"]), E("", 0), CS("a"), Sync, Ready(1), B("", "a", &[]), E("", 0), Sync, Ready(1), CS("a"),
        B("", "b", &["0"]), E("", 0), Sync, Ready(1), B("", "a", &[]), Sync, Ready(1)]),
    ("close of a portal after an error is skipped", &[Q("BEGIN"), Ready(1), P("", "SELECT generate_series(1, 4)"),
        B("p", "", &[]), E("p", 1), Sync, Ready(1), Q("SAVEPOINT s"), Ready(1), DP("nothing"), CP("p"), Sync, Ready(1),
        Q("ROLLBACK TO s"), Ready(1), E("p", 1), Sync, Ready(1), CP("p"), E("p", 1), Sync, Ready(1), Q("ROLLBACK"),
        Ready(1)]),
    ("a known text after an error is skipped", &[P("a", "SELECT 1"), P("x", "SELECT 1/$1::int"), Sync, Ready(1), CS("a"),
        Sync, Ready(1), B("", "x", &["0"]), E("", 0), P("b", "SELECT 1"), Sync, Ready(1), DS("b"), Sync, Ready(1)]),
    ("execute and cursors described", &[P("", "PREPARE p AS SELECT 1 AS one"), B("", "", &[]), E("", 0), Sync, Ready(1),
        P("", "EXECUTE p"), DS(""), B("", "", &[]), DP(""), E("", 0), Sync, Ready(1), Q("BEGIN"), Ready(1),
        P("", "DECLARE c CURSOR FOR SELECT 7::int4 AS seven"), B("", "", &[]), E("", 0), P("", "FETCH ALL FROM c"),
        Binary("", "", &[]), DP(""), E("", 0), P("", "CLOSE c"), DS(""), B("", "", &[]), E("", 0),
        P("", "FETCH ALL FROM c"), Sync, Ready(1), B("", "", &[]), Sync, Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("close and parse again", &[P("a", "SELECT 1"), CS("a"), P("a", "SELECT 2"), B("", "a", &[]), E("", 0), Sync,
        Ready(1), CS("a"), P("a", "SELEC"), Sync, Ready(1), B("", "a", &[]), Sync, Ready(1)]),
    ("parse of a bad text, then of a good one", &[P("a", "SELEC 1"), P("a", "SELECT 1"), Sync, P("a", "SELECT 2"),
        B("", "a", &[]), E("", 0), Sync, Ready(2)]),
    ("a portal of a failed transaction", &[Q("BEGIN"), Ready(1), P("s", "SELECT generate_series(1, 3)"), B("p", "s", &[]),
        E("p", 1), Sync, Ready(1), Q("SELECT 1/0"), Ready(1), E("p", 1), Sync, Ready(1), B("q", "s", &[]), Sync, Ready(1),
        DS("s"), Sync, Ready(1), P("n", "SELECT 1"), Sync, Ready(1), P("", "ROLLBACK"), DS(""), B("", "", &[]), DP(""),
        E("", 0), Sync, Ready(1), E("p", 1), Sync, Ready(1)]),
    ("begin and commit in a pipeline", &[P("", "BEGIN"), B("", "", &[]), E("", 0), P("", "INSERT INTO t VALUES (7, 'x')"),
        B("", "", &[]), E("", 0), P("", "COMMIT"), B("", "", &[]), E("", 0), P("", "SELECT a FROM t"), B("", "", &[]),
        E("", 0), Sync, Ready(1)]),
    ("a pipeline that fails in its transaction", &[P("", "BEGIN"), B("", "", &[]), E("", 0), P("", "SELECT 1/0"),
        B("", "", &[]), E("", 0), P("", "COMMIT"), B("", "", &[]), E("", 0), Sync, Ready(1), P("", "COMMIT"),
        B("", "", &[]), E("", 0), Sync, Ready(1)]),
    ("one implicit transaction", &[P("", "INSERT INTO t VALUES (1, 'a')"), B("", "", &[]), E("", 0), P("", "SELECT 1/0"),
        B("", "", &[]), E("", 0), Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("several syncs", &[P("s", "INSERT INTO t VALUES ($1, 'p')"), B("", "s", &["1"]), E("", 0), Sync, B("", "s", &["x"]),
        E("", 0), Sync, B("", "s", &["3"]), E("", 0), Sync, P("", "SELECT a FROM t ORDER BY a"), B("", "", &[]), DP(""),
        E("", 0), Sync, Ready(4)]),
    ("several syncs in a transaction", &[P("s", "SELECT 1/$1::int"), Sync, P("", "BEGIN"), B("", "", &[]), E("", 0), Sync,
        B("", "s", &["1"]), E("", 0), Sync, B("", "s", &["0"]), E("", 0), Sync, B("", "s", &["1"]), E("", 0), Sync,
        P("", "ROLLBACK"), B("", "", &[]), E("", 0), Sync, B("", "s", &["1"]), E("", 0), Sync, Ready(7)]),
    ("query in a pipeline", &[P("s", "SELECT $1::text"), B("", "s", &["a"]), E("", 0), Q("SELECT 'simple'"),
        B("", "s", &["b"]), E("", 0), Sync, Ready(2)]),
    ("deferred constraint at sync", &[P("", "INSERT INTO child VALUES (1, 999)"), B("", "", &[]), E("", 0), Sync,
        Ready(1), Q("SELECT count(*) FROM child"), Ready(1)]),
    ("deferred constraint, stepwise", &[P("", "SHOW work_mem"), B("", "", &[]), E("", 0),
        P("", "INSERT INTO child VALUES (1, 999)"), B("", "", &[]), E("", 0), Sync, Ready(1),
        Q("SELECT count(*) FROM child"), Ready(1)]),
    ("notices in a pipeline", &[P("", "DO $$ BEGIN RAISE NOTICE 'hm'; END $$"), B("", "", &[]), E("", 0),
        P("", "SELECT 1"), B("", "", &[]), E("", 0), Sync, Ready(1)]),
    ("parameter status in a pipeline", &[P("", "SET application_name = 'piped'"), B("", "", &[]), E("", 0),
        P("", "SHOW application_name"), B("", "", &[]), E("", 0), Sync, Ready(1)]),
    ("schema change", &[P("s", "SELECT * FROM t"), B("", "s", &[]), E("", 0), Sync, Ready(1),
        P("", "CREATE TABLE made (a int)"), B("", "", &[]), E("", 0), Sync, Ready(1), P("", "DROP TABLE made"),
        B("", "", &[]), E("", 0), Sync, Ready(1), B("", "s", &[]), E("", 0), Sync, Ready(1)]),
    ("not in a transaction block", &[Q("BEGIN"), Ready(1), Q("VACUUM t"), Ready(1), Q("ROLLBACK"), Ready(1),
        P("", "VACUUM t"), B("", "", &[]), E("", 0), Sync, Ready(1)]),
    ("named portals in one batch", &[P("s", "SELECT $1::int"), B("a", "s", &["1"]), B("b", "s", &["2"]), E("b", 0),
        E("a", 0), DP("a"), CP("a"), E("a", 0), Sync, Ready(1)]),
];

#[rustfmt::skip]
const COPY: &[Script] = &[
    ("in and out", &[Q("COPY t FROM STDIN"), Until('G'), Data("1\tone\n2\t"), Data("two\n"), CopyDone, Ready(1),
        Q("COPY t TO STDOUT"), Ready(1), Q("COPY (SELECT 1 WHERE false) TO STDOUT (FORMAT binary)"), Ready(1)]),
    ("in fails by the client", &[Q("COPY t FROM STDIN"), Until('G'), Data("1\tone\n"), CopyFail, Ready(1),
        Q("SELECT count(*) FROM t"), Ready(1)]),
    ("in fails by a row", &[Q("COPY t FROM STDIN"), Until('G'), Data("one\tone\n"), Data("2\ttwo\n"), CopyDone, Ready(1),
        Q("SELECT count(*) FROM t"), Ready(1)]),
    ("sent ahead", &[Q("COPY t FROM STDIN"), Data("1\tone\n"), CopyDone, Q("SELECT count(*) FROM t"), Ready(2)]),
    ("of nothing", &[Q("COPY nowhere FROM STDIN"), Data("1\tone\n"), CopyDone, Q("SELECT count(*) FROM t"), Ready(2)]),
    ("several in one text", &[Q("COPY t FROM STDIN; SELECT 1; COPY t FROM STDIN"), Until('G'), Data("1\tone\n"), CopyDone,
        Until('G'), Data("2\ttwo\n"), CopyDone, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("in a transaction", &[Q("BEGIN"), Ready(1), Q("COPY t FROM STDIN"), Until('G'), Data("x\n"), CopyDone, Ready(1),
        Q("SELECT 1"), Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("extended, done", &[P("", "COPY t FROM STDIN"), B("", "", &[]), DP(""), E("", 0), Sync, Until('G'), Data("1\tone\n"),
        CopyDone, Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, failed", &[P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Sync, Until('G'), Data("1\tone\n"),
        CopyFail, Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, a bad row", &[P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Sync, Until('G'), Data("one\n"),
        Data("two\n"), CopyDone, Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, flushed", &[P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Flush, Until('G'), Data("1\tone\n"),
        CopyDone, Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, flush and sync are ignored", &[P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Sync, Until('G'),
        Flush, Sync, Data("1\tone\n"), Sync, CopyDone, Sync, Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, sent ahead", &[P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Data("1\tone\n"), CopyDone, Sync,
        Ready(1), Q("SELECT count(*) FROM t"), Ready(1)]),
    ("extended, more in the pipeline", &[P("s", "SELECT 1"), P("", "COPY t FROM STDIN"), B("", "", &[]), E("", 0), Flush,
        Until('G'), Data("1\tone\n"), CopyDone, B("", "s", &[]), E("", 0), Sync, Ready(1)]),
    ("extended out", &[P("", "COPY (SELECT generate_series(1, 3)) TO STDOUT"), B("", "", &[]), DP(""), E("", 0), Sync,
        Ready(1), P("", "COPY (SELECT generate_series(1, 3)) TO STDOUT"), B("", "", &[]), E("", 1), Sync, Ready(1)]),
    ("stray copy messages", &[Data("1\tone\n"), CopyDone, CopyFail, Q("SELECT 1"), Ready(1), P("", "SELECT 1"), Data("x"),
        B("", "", &[]), CopyDone, E("", 0), CopyFail, Sync, Ready(1)]),
];

#[rustfmt::skip]
const OTHER: &[Script] = &[
    ("function call", &[Call(1317, &["four"]), Ready(1), Call(1317, &["\u{fc}"]), Ready(1), Call(154, &["7", "0"]),
        Ready(1), Call(4_000_000, &[]), Ready(1), Call(1317, &[]), Ready(1)]),
    ("function call in a transaction", &[Q("BEGIN"), Ready(1), Call(1317, &["four"]), Ready(1), Call(4_000_000, &[]),
        Ready(1), Call(1317, &["four"]), Ready(1), Q("ROLLBACK"), Ready(1)]),
    ("function call in a pipeline", &[P("s", "SELECT 1"), B("", "s", &[]), E("", 0), Call(1317, &["four"]), Sync, Ready(2)]),
    ("function call while pinned", &[Q("CREATE TEMP TABLE mine (a int)"), Ready(1), Call(1317, &["four"]), Ready(1),
        Q("SELECT count(*) FROM mine"), Ready(1)]),
    ("listen", &[Q("LISTEN ch"), Ready(1), Elsewhere("NOTIFY ch, 'idle'"), Until('A'), Q("BEGIN"), Ready(1),
        Elsewhere("NOTIFY ch, 'in transaction'"), Quiet, Q("COMMIT"), Ready(1), Q("NOTIFY ch, 'own'"), Ready(1),
        Q("UNLISTEN ch"), Ready(1), Elsewhere("NOTIFY ch, 'late'"), Quiet]),
    ("listen, extended", &[P("", "LISTEN ch"), DS(""), B("", "", &[]), DP(""), E("", 0), Sync, Ready(1),
        P("", "NOTIFY ch, 'own'"), B("", "", &[]), E("", 0), Sync, Ready(1), P("", "UNLISTEN *"), B("", "", &[]),
        E("", 0), Sync, Ready(1)]),
    ("terminate", &[Q("SELECT 1"), Ready(1), Terminate, Closed]),
    ("terminate in a pipeline", &[P("", "SELECT 1"), B("", "", &[]), E("", 0), Terminate, Closed]),
    ("an unknown message", &[Frame(b'?', b""), Closed]),
    ("a password after login", &[Frame(b'p', b"secret\0"), Closed]),
    ("terminated by the administrator", &[Q("BEGIN"), Ready(1), Q("SELECT count(*) FROM t"), Ready(1),
        Elsewhere("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop' AND state = 'idle in transaction'"),
        Closed]),
];

#[tokio::test(flavor = "multi_thread")]
async fn simple_queries() -> Result<()> {
    compare(SIMPLE).await
}

#[tokio::test(flavor = "multi_thread")]
async fn extended_queries() -> Result<()> {
    compare(EXTENDED).await
}

#[tokio::test(flavor = "multi_thread")]
async fn copies() -> Result<()> {
    compare(COPY).await
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_else() -> Result<()> {
    compare(OTHER).await
}

/// Postgres goes on after some of these. weir ends the session: what follows a message that lies about itself is not trusted.
const UNTRUSTED: &[&[Do]] = &[
    &[Frame(b'P', b"x")],
    &[Frame(b'B', b"\0\0\0\x05")],
    &[Frame(b'Q', b"SELECT 1")],
    &[Frame(b'Q', b"SELECT 1\0more")],
    &[Frame(b'D', b"Xa\0")],
    &[Frame(b'E', b"a\0")],
    &[Frame(b'C', b"S")],
    &[Q("COPY t FROM STDIN"), Until('G'), Data("1\tone\n"), Q("SELECT 1")],
    &[Q("COPY t FROM STDIN"), Until('G'), Data("1\tone\n"), Frame(b'?', b"")],
];

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_lie_end_the_session() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    tier.connect().await?.batch_execute(SCHEMA).await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    for steps in UNTRUSTED {
        let seen = play(&tier.dsn("shop"), &[steps, &[Closed][..]].concat(), &admin).await?;
        let [.., error, closed] = &seen[..] else { bail!("{steps:?}: {seen:?}") };
        assert!(error.contains("S=FATAL") && error.contains("C=08P01") && closed == "closed", "{steps:?}: {seen:?}");
    }
    let rows = admin.query_one("SELECT count(*) FROM t", &[]).await?.get::<_, i64>(0);
    assert_eq!(rows, 0, "a copy that was cut short leaves nothing");
    Ok(())
}

const SCHEMA: &str = "
    CREATE TABLE t (a int, b text);
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (id int, parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);";

async fn compare(scripts: &[Script]) -> Result<()> {
    let mut differences = String::new();
    for shards in [1, 2] {
        let tier = Tier::builder().shards(shards).start().await?;
        tier.connect().await?.batch_execute(SCHEMA).await?;
        let primary = &tier.shards[0].primary;
        let direct = primary.dsn("shop", "shop");
        let only = std::env::var("SCRIPT").ok();
        for (name, steps) in scripts.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| *name == only)) {
            if shards > 1 && ONE_SHARD_ONLY.contains(name) {
                continue;
            }
            let admin = primary.admin("shop").await?;
            admin.batch_execute("TRUNCATE t, child").await?;
            let wanted = play(&direct, steps, &admin).await;
            admin.batch_execute("TRUNCATE t, child").await?;
            let wanted = wanted.with_context(|| format!("{name}: Postgres itself"))?;
            let got = match play(&tier.dsn("shop"), steps, &admin).await {
                Ok(got) => got,
                Err(error) => vec![format!("broke: {error:#}")],
            };
            if wanted != got {
                let _ = writeln!(differences, "\n== {name}, {shards} shard(s)\n{}", difference(&wanted, &got));
            }
        }
        assert!(!tier.weir_log().contains("panicked"), "{}", tier.weir_log());
    }
    assert!(differences.is_empty(), "weir answers differently from Postgres:{differences}");
    Ok(())
}

/// Both transcripts in one: a line that only one has is marked.
fn difference(wanted: &[String], got: &[String]) -> String {
    let weirs = |text: &mut String, lines: &[String]| lines.iter().for_each(|line| text.extend(["weir ", line, "\n"]));
    let (mut text, mut at) = (String::new(), 0);
    for want in wanted {
        match got[at..].iter().position(|have| have == want).filter(|ahead| *ahead < 4) {
            Some(ahead) => {
                weirs(&mut text, &got[at..at + ahead]);
                let _ = writeln!(text, "     {want}");
                at += ahead + 1;
            }
            None => text.extend(["  pg ", want, "\n"]),
        }
    }
    weirs(&mut text, &got[at..]);
    text
}

/// Plays a script on a fresh connection; the frames that came, as text.
async fn play(dsn: &str, steps: &[Do], admin: &tokio_postgres::Client) -> Result<Vec<String>> {
    let mut raw = Raw::login(dsn, &[("application_name", "script")]).await?;
    let mut seen = Vec::new();
    for step in steps {
        let mut note = |kind: u8, body: &Bytes| seen.push(describe(kind, body));
        match step {
            Ready(count) => {
                let mut left = *count;
                while left > 0 {
                    let (kind, body) = next(&mut raw, step).await?;
                    note(kind, &body);
                    left -= usize::from(kind == server::READY);
                }
            }
            Until(tag) => loop {
                let (kind, body) = next(&mut raw, step).await?;
                note(kind, &body);
                if char::from(kind) == *tag {
                    break;
                }
            },
            Closed => loop {
                match raw.next().await {
                    Ok((kind, body)) => note(kind, &body),
                    Err(error) if format!("{error:#}").contains("no reply") => bail!("was not closed"),
                    Err(_) => {
                        seen.push("closed".to_owned());
                        break;
                    }
                }
            },
            Quiet => {
                raw.flush().await?;
                if let Ok(came) = tokio::time::timeout(Duration::from_millis(200), raw.next()).await {
                    let (kind, body) = came?;
                    note(kind, &body);
                }
            }
            Elsewhere(sql) => {
                raw.flush().await?;
                admin.batch_execute(sql).await?;
            }
            message => put(message, &mut raw.out),
        }
    }
    settle(&mut seen);
    Ok(seen)
}

/// Settings and notifications are reported when the server sees fit, at the latest before ReadyForQuery: so they are put there.
fn settle(seen: &mut Vec<String>) {
    let mut settled = Vec::with_capacity(seen.len());
    let mut held_back: Vec<String> = Vec::new();
    for frame in seen.drain(..) {
        match frame.as_bytes()[0] {
            server::PARAMETER_STATUS | server::NOTIFICATION => held_back.push(frame),
            server::READY => {
                held_back.sort();
                settled.append(&mut held_back);
                settled.push(frame);
            }
            _ => settled.push(frame),
        }
    }
    settled.append(&mut held_back);
    *seen = settled;
}

async fn next(raw: &mut Raw, step: &Do) -> Result<(u8, Bytes)> {
    raw.next().await.with_context(|| format!("in {step:?}"))
}

fn put(step: &Do, out: &mut BytesMut) {
    match *step {
        Q(sql) => put_query(out, sql),
        P(name, sql) => Parse { name: name.as_bytes(), sql: sql.as_bytes(), types: b"" }.put(out),
        B(portal, statement, values) => bind(out, portal, statement, values, 0),
        Binary(portal, statement, values) => bind(out, portal, statement, values, 1),
        DS(name) => Target { object: Object::Statement, name: name.as_bytes() }.put(tag::DESCRIBE, out),
        DP(name) => Target { object: Object::Portal, name: name.as_bytes() }.put(tag::DESCRIBE, out),
        CS(name) => Target { object: Object::Statement, name: name.as_bytes() }.put(tag::CLOSE, out),
        CP(name) => Target { object: Object::Portal, name: name.as_bytes() }.put(tag::CLOSE, out),
        E(portal, rows_max) => Execute { portal: portal.as_bytes(), rows_max }.put(out),
        Sync => put_sync(out),
        Flush => put_flush(out),
        Data(text) => frame::put(out, tag::COPY_DATA, |out| out.extend_from_slice(text.as_bytes())),
        CopyDone => frame::put(out, tag::COPY_DONE, |_| {}),
        CopyFail => put_copy_fail(out, "changed my mind"),
        Terminate => put_terminate(out),
        Call(oid, arguments) => frame::put(out, tag::FUNCTION_CALL, |out| {
            out.extend_from_slice(&oid.to_be_bytes());
            out.extend_from_slice(&[0, 0]);
            values(out, arguments);
            out.extend_from_slice(&[0, 0]);
        }),
        Frame(kind, body) => frame::put(out, kind, |out| out.extend_from_slice(body)),
        Ready(_) | Until(_) | Closed | Elsewhere(_) | Quiet => {}
    }
}

fn bind(out: &mut BytesMut, portal: &str, statement: &str, parameters: &[&str], format: u16) {
    frame::put(out, tag::BIND, |out| {
        frame::put_cstr(out, portal.as_bytes());
        frame::put_cstr(out, statement.as_bytes());
        out.extend_from_slice(&[0, 0]);
        values(out, parameters);
        out.extend_from_slice(&[0, 1]);
        out.extend_from_slice(&format.to_be_bytes());
    });
}

fn values(out: &mut BytesMut, values: &[&str]) {
    out.extend_from_slice(&(values.len() as u16).to_be_bytes());
    for value in values {
        out.extend_from_slice(&(value.len() as u32).to_be_bytes());
        out.extend_from_slice(value.as_bytes());
    }
}

/// A frame as text, without what may differ.
fn describe(kind: u8, body: &[u8]) -> String {
    let contents = match kind {
        server::ERROR | server::NOTICE => report(body),
        server::ROW_DESCRIPTION => columns(body),
        server::NOTIFICATION => body.get(4..).unwrap_or_default().escape_ascii().to_string(),
        _ => body.escape_ascii().to_string(),
    };
    format!("{} {contents}", char::from(kind))
}

fn columns(body: &[u8]) -> String {
    let Ok(fields) = row::fields(body) else { return "malformed".to_owned() };
    let text = |field: &row::Field<'_>| {
        let row::Field { name, table, attribute, type_oid, type_size, type_modifier, binary } = field;
        let name = String::from_utf8_lossy(name);
        format!("{name}:{table}.{attribute}:{type_oid}({type_size},{type_modifier}){}", if *binary { "b" } else { "t" })
    };
    fields.iter().map(text).collect::<Vec<_>>().join(" ")
}

/// All fields but those that name a place in the server's source.
fn report(body: &[u8]) -> String {
    let mut text = String::new();
    for field in body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
        if !matches!(field[0], b'F' | b'L' | b'R') {
            let value = String::from_utf8_lossy(&field[1..]);
            // A statement's name in this one message is the server's, which is weir's.
            let value = match value.split_once("but prepared statement ") {
                Some((before, _)) if field[0] == b'M' => before.to_owned(),
                _ => value.into_owned(),
            };
            let _ = write!(text, "{}={value} ", char::from(field[0]));
        }
    }
    text
}
