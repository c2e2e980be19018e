//! Reads what a server's own catalogue says of relations and functions, and checks the declared tables against it.
//!
//! Invariant: one snapshot (a read-only repeatable-read transaction), so that a table is never seen with another
//! table's keys. Where a question has no certain answer the cautious one is given: a relation is "other", a collation
//! is not byte order, a write may spread.
//! Source: pg_class, pg_attribute, pg_attrdef, pg_index, pg_constraint, pg_rewrite, pg_policy, pg_inherits, pg_depend, pg_proc,
//! pg_collation, pg_database of Postgres 13 to 18.

pub mod drift;
mod rules;

use std::collections::BTreeMap;

use tokio_postgres::{Client, Error, Row};
use weir_core::session::effect::body_keeps;
use weir_core::topology::catalog::reach::{BODY_BYTES_MAX, Graph, Names, is_system_schema};
use weir_core::topology::catalog::{
    Catalog, Column, DefaultKind, DrawnColumn, Overload, Relation, RelationKind, RelationName, SequenceRule,
    UniqueColumn, UniqueState, Volatility,
};

use weir_core::unique::script::TRIGGERS;

pub use rules::{ForeignKey, RuleProblem, check_rules};

/// Byte order: the C and POSIX locales of any provider, and C.UTF-8, which orders by code point, i.e. by UTF-8 bytes.
/// Columns that only newer servers have are read through jsonb, so that one text serves all versions.
const DATABASE: &str = "
SELECT pg_encoding_to_char(d.encoding) = 'UTF8' OR d.datcollate IN ('C', 'POSIX'),
       CASE coalesce(to_jsonb(d) ->> 'datlocprovider', 'c')
            WHEN 'c' THEN d.datcollate IN ('C', 'POSIX', 'C.UTF-8', 'C.utf8')
            WHEN 'b' THEN true
            ELSE false END,
       EXISTS (SELECT FROM pg_settings s WHERE s.name = 'extra_float_digits' AND s.reset_val::int4 < 1)
           OR EXISTS (SELECT FROM pg_db_role_setting r, unnest(r.setconfig) e
                      WHERE split_part(e, '=', 1) = 'extra_float_digits' AND split_part(e, '=', 2)::int4 < 1),
       EXISTS (SELECT FROM pg_cast c WHERE c.castcontext <> 'e' AND c.oid >= 16384)
FROM pg_database d WHERE d.datname = current_database()";

/// The catalogue's own tables change under DDL without being written, and weir's beside what clients write, so they are never plain.
const RELATIONS: &str = "
SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text,
       c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'weir') AND NOT c.relispartition AND NOT c.relrowsecurity
           AND NOT EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid)
           AND NOT EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)),
       EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace o ON o.oid = p.pronamespace
               WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND o.nspname <> 'weir')
           OR EXISTS (SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.confrelid = c.oid
                      AND (f.confdeltype IN ('c', 'n', 'd') OR f.confupdtype IN ('c', 'n', 'd'))),
       EXISTS (SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.confrelid = c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname !~ '^pg_(toast|temp_|toast_temp_)'";

/// A domain is named by its base type, as RowDescription does. A type with a collation of its own that is not one of
/// the plain text types (citext, arrays) may compare in its own way. A default's stored tree names every function it calls by OID;
/// literals in it are bytes, so that none can be taken for a call.
const COLUMNS: &str = "
SELECT a.attrelid, a.attname::text, coalesce(nullif(t.typbasetype, 0), t.oid), a.attnotnull,
       a.attcollation = 0 OR (
           coalesce(nullif(t.typbasetype, 0), t.oid) IN (25, 1043, 1042, 19)
           AND CASE WHEN a.attcollation = 100 THEN $1
                    WHEN o.collprovider = 'c' THEN o.collcollate IN ('C', 'POSIX', 'C.UTF-8', 'C.utf8')
                    ELSE o.collprovider = 'b' END),
       CASE WHEN a.attidentity <> '' THEN 'differs'
            WHEN a.attgenerated <> '' THEN 'generated'
            WHEN coalesce(f.adbin, t.typdefaultbin) IS NULL THEN 'none'
            WHEN coalesce(f.adbin, t.typdefaultbin)::text ~ '\\m(SQLVALUEFUNCTION|NEXTVALUEEXPR|COERCEVIAIO)\\M' OR EXISTS (
                 SELECT FROM regexp_matches(coalesce(f.adbin, t.typdefaultbin)::text, ':(?:op)?funcid (\\d+)', 'g') AS m
                 LEFT JOIN pg_proc p ON p.oid = m[1]::oid WHERE p.provolatile IS DISTINCT FROM 'i') THEN 'differs'
            ELSE 'constant' END
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
LEFT JOIN pg_collation o ON o.oid = a.attcollation
WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
ORDER BY a.attrelid, a.attnum";

const PARTITIONS: &str = "
SELECT n.nspname::text, c.relname::text, rn.nspname::text, r.relname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class r ON r.oid = pg_partition_root(c.oid) JOIN pg_namespace rn ON rn.oid = r.relnamespace
WHERE c.relispartition AND c.relkind IN ('r', 'p', 'f')";

/// Columns whose default is the next number of a sequence that counts up and ends: identity columns own theirs, others call
/// nextval() of it and do nothing else.
const DRAWN: &str = "
SELECT n.nspname::text, c.relname::text, a.attname::text, sn.nspname::text, s.relname::text, a.attidentity = 'a',
       q.seqstart, q.seqincrement, q.seqmax
FROM (SELECT refobjid AS relation, refobjsubid AS number, objid AS sequence FROM pg_depend
      WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype = 'i' AND refobjsubid > 0
      UNION ALL
      SELECT f.adrelid, f.adnum, d.refobjid FROM pg_attrdef f
      JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
      WHERE pg_get_expr(f.adbin, f.adrelid) ~ '^nextval\\(''[^'']*''::regclass\\)(::\\w+)?$') u
JOIN pg_attribute a ON a.attrelid = u.relation AND a.attnum = u.number AND NOT a.attisdropped AND a.attgenerated = ''
JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p') JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class s ON s.oid = u.sequence AND s.relkind = 'S' JOIN pg_namespace sn ON sn.oid = s.relnamespace
JOIN pg_sequence q ON q.seqrelid = s.oid AND q.seqincrement > 0 AND NOT q.seqcycle
ORDER BY a.attrelid, a.attnum";

/// An expression in an index has no name: it is shown as an empty one, which never equals a shard key.
const UNIQUE_INDEXES: &str = "
SELECT i.indrelid, array(
           SELECT coalesce(a.attname::text, '')
           FROM generate_series(0, i.indnkeyatts - 1) AS k
           LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k] AND a.attnum <> 0
           ORDER BY k)
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE (i.indisunique OR i.indisexclusion) AND n.nspname <> 'pg_catalog' AND n.nspname !~ '^pg_toast'
ORDER BY i.indrelid, i.indexrelid";

/// The codes i, s, v happen to sort from harmless to harmful. A variadic function takes any number of arguments, also none.
const BUILTINS: &str = "
SELECT proname::text,
       (pronargs - pronargdefaults - CASE WHEN provariadic <> 0 THEN 1 ELSE 0 END)::int4,
       (CASE WHEN provariadic <> 0 THEN 32767 ELSE pronargs END)::int4,
       max(provolatile::text)
FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace GROUP BY 1, 2, 3 ORDER BY 1, 2, 3";

/// A function of C or of the server itself says nothing of tables, and keeps no state of its own if it belongs to an extension
/// or Postgres lets it change nothing; one in SQL's own syntax has no text but its definition.
const USER_FUNCTIONS: &str = "
SELECT p.proname::text, p.provolatile = 'v',
       CASE WHEN p.prokind = 'a' OR l.lanname IN ('c', 'internal') THEN ''
            WHEN octet_length(p.prosrc) > $1 THEN NULL
            WHEN p.prosrc <> '' THEN p.prosrc
            ELSE pg_get_functiondef(p.oid) END,
       l.lanname::text,
       p.provolatile <> 'v' OR p.prokind = 'a' OR EXISTS (
           SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname NOT IN ('pg_catalog', 'weir')";

const AGGREGATES: &str = "SELECT DISTINCT proname::text, prokind = 'a' FROM pg_proc WHERE prokind IN ('a', 'w')";

/// What rules (views are rules), policies and partitions use: a relation by its OID, or a function by its name. Parent and
/// child are parts of each other. A sequence is no rows.
const USES: &str = "
SELECT u.object, CASE WHEN d.refclassid = 'pg_class'::regclass THEN d.refobjid ELSE 0 END, p.proname::text
FROM (SELECT ev_class AS object, 'pg_rewrite'::regclass::oid AS classid, oid FROM pg_rewrite
      UNION ALL SELECT polrelid, 'pg_policy'::regclass::oid, oid FROM pg_policy) u
JOIN pg_depend d ON d.classid = u.classid AND d.objid = u.oid AND d.refobjid <> u.object
LEFT JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid
WHERE d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass)
UNION SELECT inhparent, inhrelid, NULL FROM pg_inherits
UNION SELECT inhrelid, inhparent, NULL FROM pg_inherits";

const TRIGGER_FUNCTIONS: &str = "
SELECT t.tgrelid, p.proname::text FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
JOIN pg_namespace n ON n.oid = p.pronamespace WHERE NOT t.tgisinternal AND n.nspname <> 'weir'";

/// How far weir has come with columns that are unique over all shards, and whether all their triggers fire.
const UNIQUE: &str = "
SELECT r.schema_name, r.table_name, r.column_name, r.state, coalesce(r.reason, ''), (
           SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           JOIN pg_trigger t ON t.tgrelid = c.oid JOIN pg_proc p ON p.oid = t.tgfoid
           JOIN pg_namespace w ON w.oid = p.pronamespace
           WHERE n.nspname = r.schema_name AND c.relname = r.table_name AND w.nspname = 'weir' AND t.tgenabled IN ('O', 'A')
             AND p.proname = 'weir_unique_' || lpad(to_hex(r.rule), 16, '0') || '_note')
FROM weir.unique_rule r";

const FOREIGN_KEYS: &str = "
SELECT n.nspname::text, c.relname::text, fn.nspname::text, fc.relname::text,
       array(SELECT a.attname::text FROM unnest(f.conkey) WITH ORDINALITY AS k(num, pos)
             JOIN pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = k.num ORDER BY k.pos),
       array(SELECT a.attname::text FROM unnest(f.confkey) WITH ORDINALITY AS k(num, pos)
             JOIN pg_attribute a ON a.attrelid = f.confrelid AND a.attnum = k.num ORDER BY k.pos)
FROM pg_constraint f
JOIN pg_class c ON c.oid = f.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class fc ON fc.oid = f.confrelid JOIN pg_namespace fn ON fn.oid = fc.relnamespace
WHERE f.contype = 'f' ORDER BY 1, 2, f.conname";

/// Reads the catalogue; `version` becomes the value's own. The client must be idle and is not used by others meanwhile.
/// Not cancel-safe: a dropped read leaves a transaction open on the client.
pub async fn read(client: &Client, version: u64) -> Result<Catalog, Error> {
    snapshot(client, read_all(client, version)).await
}

/// The foreign keys between relations, for [`check_rules`].
pub async fn foreign_keys(client: &Client) -> Result<Vec<ForeignKey>, Error> {
    client.query(FOREIGN_KEYS, &[]).await?.iter().map(ForeignKey::from_row).collect()
}

/// Runs `work` within one snapshot. COMMIT also ends a failed transaction.
async fn snapshot<T>(client: &Client, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let result = work.await;
    let ended = client.batch_execute("COMMIT").await;
    let value = result?;
    ended.map(|()| value)
}

async fn read_all(client: &Client, version: u64) -> Result<Catalog, Error> {
    let database = client.query_one(DATABASE, &[]).await?;
    let database_byte_order = database.try_get::<_, bool>(0)? && database.try_get::<_, bool>(1)?;
    let mut relations = named_relations(client).await?;
    columns(client, database_byte_order, &mut relations).await?;
    unique_indexes(client, &mut relations).await?;
    let (floats_rounded, own_casts) = (database.try_get(2)?, database.try_get(3)?);
    let mut catalog = Catalog { database_byte_order, floats_rounded, own_casts, version, ..Catalog::default() };
    let mut named = BTreeMap::new();
    for (oid, Named { schema, name, relation }) in relations {
        if relation.kind != RelationKind::Sequence {
            named.insert(oid, (schema.clone(), name.clone()));
        }
        catalog.relations.entry(schema).or_default().insert(name, relation);
    }
    for row in client.query(PARTITIONS, &[]).await? {
        catalog.partitions.insert((text(&row, 0)?, text(&row, 1)?), (text(&row, 2)?, text(&row, 3)?));
    }
    drawn(client, &mut catalog).await?;
    functions(client, &mut catalog).await?;
    unique(client, &mut catalog).await?;
    let mut graph = uses(client, &named).await?;
    bodies(client, &mut graph, &mut catalog).await?;
    graph.close(&mut catalog);
    Ok(catalog)
}

async fn drawn(client: &Client, catalog: &mut Catalog) -> Result<(), Error> {
    for row in client.query(DRAWN, &[]).await? {
        let sequence: RelationName = (text(&row, 3)?, text(&row, 4)?);
        let rule = SequenceRule { start: row.try_get(6)?, increment: row.try_get(7)?, max: row.try_get(8)? };
        let column = DrawnColumn { column: text(&row, 2)?, sequence: sequence.clone(), always: row.try_get(5)? };
        catalog.drawn.entry((text(&row, 0)?, text(&row, 1)?)).or_default().push(column);
        catalog.sequences.insert(sequence, rule);
    }
    Ok(())
}

async fn unique(client: &Client, catalog: &mut Catalog) -> Result<(), Error> {
    let there = client.query_one("SELECT to_regclass('weir.unique_rule') IS NOT NULL", &[]).await?;
    if !there.try_get::<_, bool>(0)? {
        return Ok(());
    }
    for row in client.query(UNIQUE, &[]).await? {
        let noted = row.try_get::<_, i64>(5)? == TRIGGERS.len() as i64;
        let state = match row.try_get(3)? {
            "failed" => UniqueState::Failed { reason: text(&row, 4)?, noted },
            _ if !noted => continue,
            "valid" => UniqueState::Valid,
            _ => UniqueState::Building,
        };
        let column = UniqueColumn { column: text(&row, 2)?, state };
        catalog.unique.entry((text(&row, 0)?, text(&row, 1)?)).or_default().push(column);
    }
    Ok(())
}

async fn functions(client: &Client, catalog: &mut Catalog) -> Result<(), Error> {
    for row in client.query(BUILTINS, &[]).await? {
        let volatility = match row.try_get(3)? {
            "i" => Volatility::Immutable,
            "s" => Volatility::Stable,
            _ => Volatility::Volatile,
        };
        let arguments = |index| row.try_get::<_, i32>(index).map(|count| u16::try_from(count).unwrap_or(0));
        let overload = Overload { least_arguments: arguments(1)?, most_arguments: arguments(2)?, volatility };
        catalog.builtin_functions.entry(text(&row, 0)?).or_default().push(overload);
    }
    for row in client.query(AGGREGATES, &[]).await? {
        let names = if row.try_get(1)? { &mut catalog.aggregates } else { &mut catalog.windows };
        names.insert(text(&row, 0)?);
    }
    Ok(())
}

/// What rules, policies, partitions and triggers use.
async fn uses(client: &Client, names: &BTreeMap<u32, RelationName>) -> Result<Graph, Error> {
    let mut graph = Graph::default();
    for row in client.query(USES, &[]).await? {
        let Some(user) = names.get(&row.try_get(0)?).filter(|name| !is_system_schema(&name.0)) else { continue };
        let uses = graph.relations.entry(user.clone()).or_default();
        uses.relations.extend(names.get(&row.try_get(1)?).filter(|name| !is_system_schema(&name.0)).cloned());
        uses.functions.extend(row.try_get::<_, Option<String>>(2)?.map(String::into_boxed_str));
    }
    for row in client.query(TRIGGER_FUNCTIONS, &[]).await? {
        let Some(target) = names.get(&row.try_get(0)?) else { continue };
        graph.triggers.entry(target.clone()).or_default().functions.insert(text(&row, 1)?);
    }
    Ok(graph)
}

/// The user's functions and what their bodies mention.
async fn bodies(client: &Client, graph: &mut Graph, catalog: &mut Catalog) -> Result<(), Error> {
    let limit = BODY_BYTES_MAX as i32;
    let rows = client.query(USER_FUNCTIONS, &[&limit]).await?;
    for row in &rows {
        catalog.user_functions.entry(text(row, 0)?).or_default().may_write |= row.try_get::<_, bool>(1)?;
    }
    let names = Names::of(catalog);
    for row in &rows {
        let (name, body, language): (&str, Option<&str>, &str) = (row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
        let harmless_code = matches!(language, "c" | "internal") && row.try_get(4)?;
        if !harmless_code && body.is_none_or(|body| body_keeps(language, body)) {
            graph.keepers.insert(name.into());
        }
        graph.add_body(name, body, &names, catalog);
    }
    Ok(())
}

struct Named {
    schema: Box<str>,
    name: Box<str>,
    relation: Relation,
}

async fn named_relations(client: &Client) -> Result<BTreeMap<u32, Named>, Error> {
    let mut relations = BTreeMap::new();
    for row in client.query(RELATIONS, &[]).await? {
        let is_plain: bool = row.try_get(4)?;
        let kind = match row.try_get(3)? {
            "r" if is_plain => RelationKind::PlainTable,
            "v" => RelationKind::View,
            "m" => RelationKind::MaterializedView,
            "f" => RelationKind::Foreign,
            "S" => RelationKind::Sequence,
            _ => RelationKind::OtherTable,
        };
        let relation = Relation {
            kind,
            columns: Vec::new(),
            writes_spread: row.try_get(5)?,
            referenced: row.try_get(6)?,
            unique_columns: Vec::new(),
            reads: Vec::new(),
            triggers: Vec::new(),
        };
        relations.insert(row.try_get(0)?, Named { schema: text(&row, 1)?, name: text(&row, 2)?, relation });
    }
    Ok(relations)
}

async fn columns(
    client: &Client,
    database_byte_order: bool,
    relations: &mut BTreeMap<u32, Named>,
) -> Result<(), Error> {
    for row in client.query(COLUMNS, &[&database_byte_order]).await? {
        if let Some(named) = relations.get_mut(&row.try_get(0)?) {
            named.relation.columns.push(Column {
                name: text(&row, 1)?,
                type_oid: row.try_get(2)?,
                byte_order: row.try_get(4)?,
                not_null: row.try_get(3)?,
                default: match row.try_get(5)? {
                    "none" => DefaultKind::None,
                    "generated" => DefaultKind::Generated,
                    "constant" => DefaultKind::Constant,
                    _ => DefaultKind::Differs,
                },
            });
        }
    }
    Ok(())
}

async fn unique_indexes(client: &Client, relations: &mut BTreeMap<u32, Named>) -> Result<(), Error> {
    for row in client.query(UNIQUE_INDEXES, &[]).await? {
        if let Some(named) = relations.get_mut(&row.try_get(0)?) {
            let names: Vec<String> = row.try_get(1)?;
            named.relation.unique_columns.push(names.into_iter().map(String::into_boxed_str).collect());
        }
    }
    Ok(())
}

fn text(row: &Row, index: usize) -> Result<Box<str>, Error> {
    row.try_get::<_, String>(index).map(String::into_boxed_str)
}
