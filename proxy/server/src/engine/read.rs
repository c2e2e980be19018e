//! Reads from the home shard's catalogue what the fallback engine's database is made of.
//!
//! Invariant: one snapshot, and an empty search_path, so that every name in what the server prints carries its schema. What may mean
//! something else on another server is skipped with a reason.
//! Source: pg_class, pg_type, pg_proc, pg_rewrite, pg_authid and the pg_get_*def functions of Postgres 13 to 18.

use std::fmt::Write as _;

use tokio_postgres::{Client, Error, Row};
use weir_core::engine::{Home, Object, Role, Skipped};
use weir_core::topology::catalog::Catalog;
use weir_core::topology::{Placement, TableRules};

/// Settings that shape what a statement means or how its answer looks.
const SETTINGS: &[&str] = &[
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "default_text_search_config",
    "escape_string_warning",
    "extra_float_digits",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "quote_all_identifiers",
    "search_path",
    "standard_conforming_strings",
    "timezone_abbreviations",
    "transform_null_equals",
    "xmlbinary",
    "xmloption",
];

/// Words in a definition that make it one server's: names of the catalogue, system columns, ONLY.
const OF_ONE_SERVER: &str = r"\m(pg_[a-z_]+|information_schema|ctid|tableoid|xmin|xmax|cmin|cmax|only|tablesample|current_database|current_catalog|inet_server_addr|inet_server_port|version|reg(class|proc|procedure|type|role|namespace|oper|operator|config|dictionary|collation)|nextval|currval|lastval|setval)\M";

/// Schemas whose objects are mirrored, as `n`.
const OWN: &str = "n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'weir', 'weir_engine', 'weir_fdw')";

/// The default's settings, also where weir's own role has others.
const SETTINGS_SQL: &str = "
SELECT s.name, coalesce(
    (SELECT split_part(e, '=', 2) FROM pg_db_role_setting d, unnest(d.setconfig) e
     WHERE d.setrole = 0 AND d.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND split_part(e, '=', 1) = s.name),
    CASE WHEN s.source IN ('user', 'database user', 'client', 'session', 'database') AND s.name <> 'search_path'
         THEN coalesce((SELECT f.setting FROM pg_settings f WHERE f.name = s.name), s.boot_val) ELSE s.reset_val END)
FROM pg_settings s WHERE s.name = ANY($1) ORDER BY 1";

const ROLE_SETTINGS: &str = "
SELECT r.rolname::text, e FROM pg_db_role_setting d JOIN pg_roles r ON r.oid = d.setrole, unnest(d.setconfig) e
WHERE d.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) AND r.rolname !~ '^pg_'
ORDER BY r.rolname, d.setdatabase, e";

const MEMBERSHIPS: &str = "
SELECT DISTINCT g.rolname::text, m.rolname::text FROM pg_auth_members a
JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE m.rolname !~ '^pg_' AND (g.rolname !~ '^pg_' OR g.rolname = 'pg_read_all_data') ORDER BY 1, 2";

/// `$password` and `$from` are replaced by how passwords are read, if they may be.
const ROLES: &str = "
SELECT rolname::text, rolcanlogin, rolinherit, rolsuper, $password, rolvaliduntil::text FROM $from
WHERE rolname !~ '^pg_' AND rolname <> current_user ORDER BY 1";

/// Operators and conversions of the user's own could be missing there without anybody noticing.
const STRANGERS: &str = "
SELECT (SELECT count(*) FROM pg_operator o WHERE o.oid >= 16384 AND NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_operator'::regclass AND d.objid = o.oid AND d.deptype = 'e')),
       (SELECT count(*) FROM pg_cast c WHERE c.oid >= 16384 AND NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_cast'::regclass AND d.objid = c.oid AND d.deptype = 'e'))";

const EXTENSIONS: &str = "
SELECT e.extname::text, n.nspname::text, EXISTS (
    SELECT FROM pg_depend d WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
    AND d.classid IN ('pg_operator'::regclass, 'pg_cast'::regclass))
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname NOT IN ('plpgsql', 'postgres_fdw') ORDER BY e.oid";

const GRANTEES: &str = "CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END";

/// Why the engine cannot be for this database.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Postgres(#[from] Error),
    #[error("the database has {operators} operator(s) and {casts} cast(s) of its own, which the hub cannot copy")]
    Strangers { operators: i64, casts: i64 },
}

/// What is read besides the catalogue itself.
pub struct Declared<'a> {
    pub rules: &'a TableRules,
    pub catalog: &'a Catalog,
}

/// Reads everything in one snapshot. The client must be idle and is not used by others meanwhile; its search_path is changed.
pub async fn read(client: &Client, declared: &Declared<'_>) -> Result<Home, ReadError> {
    // Read before the search_path is emptied.
    let settings = pairs(&client.query(SETTINGS_SQL, &[&SETTINGS]).await?)?;
    client.batch_execute("SET search_path = ''; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let home = everything(client, declared, settings).await;
    client.batch_execute("COMMIT").await?;
    home
}

async fn everything(
    client: &Client,
    declared: &Declared<'_>,
    settings: Vec<(String, String)>,
) -> Result<Home, ReadError> {
    let strangers = client.query_one(STRANGERS, &[]).await?;
    let (operators, casts): (i64, i64) = (strangers.try_get(0)?, strangers.try_get(1)?);
    if operators + casts > 0 {
        return Err(ReadError::Strangers { operators, casts });
    }
    let mut home = Home {
        settings,
        roles: roles(client).await?,
        memberships: pairs(&client.query(MEMBERSHIPS, &[]).await?)?,
        role_settings: pairs(&client.query(ROLE_SETTINGS, &[]).await?)?,
        schemas: schemas(client).await?,
        types: objects(client, "type", &types_sql()).await?,
        ..Home::default()
    };
    extensions(client, &mut home).await?;
    home.tables = super::tables::read(client, OWN, GRANTEES, declared).await?;
    home.keys = keys(client).await?;
    functions(client, &mut home).await?;
    views(client, &mut home).await?;
    Ok(home)
}

async fn roles(client: &Client) -> Result<Vec<Role>, Error> {
    let may_look: bool =
        client.query_one("SELECT has_table_privilege('pg_catalog.pg_authid', 'SELECT')", &[]).await?.try_get(0)?;
    let (password, from) = if may_look { ("rolpassword", "pg_authid") } else { ("NULL::text", "pg_roles") };
    let sql = ROLES.replace("$password", password).replace("$from", from);
    let role = |row: &Row| {
        Ok(Role {
            name: row.try_get(0)?,
            login: row.try_get(1)?,
            inherit: row.try_get(2)?,
            reads_all: row.try_get(3)?,
            verifier: row.try_get(4)?,
            valid_until: row.try_get(5)?,
        })
    };
    client.query(&sql, &[]).await?.iter().map(role).collect()
}

async fn schemas(client: &Client) -> Result<Vec<(String, Vec<String>)>, Error> {
    let sql = format!(
        "SELECT n.nspname::text, array(SELECT {GRANTEES} FROM aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a \
         WHERE a.privilege_type = 'USAGE' ORDER BY 1) FROM pg_namespace n WHERE {OWN} ORDER BY 1"
    );
    client.query(&sql, &[]).await?.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

async fn keys(client: &Client) -> Result<Vec<String>, Error> {
    let sql = format!(
        "SELECT format('%I.%I ', n.nspname, c.relname) || pg_get_constraintdef(k.oid) FROM pg_constraint k \
         JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE k.contype = 'p' AND {OWN} ORDER BY 1"
    );
    client.query(&sql, &[]).await?.iter().map(|row| row.try_get(0)).collect()
}

/// Those that bring operators must be there; of the others only their own objects are missed.
async fn extensions(client: &Client, home: &mut Home) -> Result<(), Error> {
    for row in client.query(EXTENSIONS, &[]).await? {
        let (name, schema, needed): (String, String, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let quote = weir_core::sql::word::quote_name;
        let sql = format!("CREATE EXTENSION IF NOT EXISTS {} SCHEMA {} CASCADE", quote(&name), quote(&schema));
        if needed {
            home.needed.push(sql);
        } else {
            home.extensions.push(Object { kind: "extension", shown: name.clone(), name, sql });
        }
    }
    Ok(())
}

/// Enumerations, domains, composite types and collations, as statements. Others have no SQL to make them of.
fn types_sql() -> String {
    let name = "format('%I.%I', n.nspname, t.typname)";
    let member = "EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e')";
    let collation = |of: &str| {
        format!(
            "coalesce((SELECT format(' COLLATE %I.%I', cn.nspname, o.collname) FROM pg_collation o \
             JOIN pg_namespace cn ON cn.oid = o.collnamespace WHERE o.oid = {of} AND o.oid <> 100), '')"
        )
    };
    format!(
        "SELECT name, shown, sql FROM (
SELECT o.oid, o.collname::text AS name, format('%I.%I', n.nspname, o.collname) AS shown,
  format('CREATE COLLATION %I.%I (PROVIDER = %s, %s, DETERMINISTIC = %s)', n.nspname, o.collname,
    CASE o.collprovider WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END,
    CASE WHEN o.collprovider = 'c' THEN format('LC_COLLATE = %L, LC_CTYPE = %L', o.collcollate, o.collctype)
         ELSE format('LOCALE = %L', coalesce(to_jsonb(o) ->> 'colllocale', to_jsonb(o) ->> 'colliculocale', o.collcollate)) END,
    o.collisdeterministic) AS sql
  FROM pg_collation o JOIN pg_namespace n ON n.oid = o.collnamespace WHERE {OWN}
UNION ALL
SELECT t.oid, t.typname::text, {name}, CASE t.typtype
  WHEN 'e' THEN format('CREATE TYPE %s AS ENUM (%s)', {name},
    (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid))
  WHEN 'd' THEN format('CREATE DOMAIN %s AS %s%s%s%s', {name}, format_type(t.typbasetype, t.typtypmod), {domain_collation},
    CASE WHEN t.typnotnull THEN ' NOT NULL' ELSE '' END,
    coalesce((SELECT string_agg(format(' CONSTRAINT %I %s', k.conname, pg_get_constraintdef(k.oid)), '' ORDER BY k.conname)
              FROM pg_constraint k WHERE k.contypid = t.oid AND k.contype = 'c'), ''))
  ELSE format('CREATE TYPE %s AS (%s)', {name},
    (SELECT string_agg(format('%I %s%s', a.attname, format_type(a.atttypid, a.atttypmod), {attribute_collation}), ', ' ORDER BY a.attnum)
     FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped)) END
  FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
  WHERE {OWN} AND NOT {member} AND (t.typtype IN ('e', 'd')
    OR t.typtype = 'c' AND EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind = 'c'))
UNION ALL
SELECT t.oid, t.typname::text, {name}, 'SELECT weir_engine.no_such_type()'
  FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
  WHERE {OWN} AND NOT {member} AND t.typtype IN ('b', 'r', 'm') AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)
) made ORDER BY oid",
        domain_collation = collation("t.typcollation"),
        attribute_collation = collation("a.attcollation"),
    )
}

async fn objects(client: &Client, kind: &'static str, sql: &str) -> Result<Vec<Object>, Error> {
    let object = |row: &Row| {
        Ok(Object {
            kind,
            name: row.try_get(0)?,
            shown: row.try_get(1)?,
            sql: row.try_get::<_, Option<String>>(2)?.unwrap_or_default(),
        })
    };
    client.query(sql, &[]).await?.iter().map(object).collect()
}

/// Functions that Postgres lets change nothing and whose text is SQL; the others are named as skipped.
async fn functions(client: &Client, home: &mut Home) -> Result<(), Error> {
    let sql = format!(
        "SELECT p.proname::text, format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
  CASE WHEN p.prokind <> 'f' THEN 'it is an aggregate, window function or procedure'
       WHEN p.provolatile = 'v' THEN 'it is volatile'
       WHEN p.prosecdef THEN 'it runs with its owner''s rights'
       WHEN l.lanname NOT IN ('sql', 'plpgsql') THEN 'it is written in ' || l.lanname
       WHEN lower(pg_get_functiondef(p.oid)) ~ $1 THEN 'it says what is true of one server only' END,
  CASE WHEN p.prokind = 'f' THEN pg_get_functiondef(p.oid) END,
  CASE WHEN p.proacl IS NOT NULL THEN array(SELECT {GRANTEES} FROM aclexplode(p.proacl) a WHERE a.privilege_type = 'EXECUTE' ORDER BY 1) END
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
WHERE {OWN} AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
ORDER BY p.oid"
    );
    // pg_catalog is what pg_get_functiondef calls Postgres's own types.
    let words = OF_ONE_SERVER.replace("pg_[a-z_]+", "pg_(?!catalog)[a-z_]+");
    for row in client.query(&sql, &[&words]).await? {
        let (name, shown): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        if let Some(reason) = row.try_get::<_, Option<String>>(2)? {
            home.skipped.push(Skipped { kind: "function".to_owned(), name, shown, reason });
            continue;
        }
        if let Some(callers) = row.try_get::<_, Option<Vec<String>>>(4)? {
            home.grants.push(format!("REVOKE ALL ON FUNCTION {shown} FROM PUBLIC"));
            home.grants.extend(callers.iter().map(|role| format!("GRANT EXECUTE ON FUNCTION {shown} TO {role}")));
        }
        home.functions.push(Object { kind: "function", name, shown, sql: row.try_get(3)? });
    }
    Ok(())
}

struct View {
    oid: u32,
    uses: Vec<u32>,
    object: Object,
}

/// A view reads with its owner's rights, so that it must belong to the same role there; a superuser's belongs to weir.
async fn views(client: &Client, home: &mut Home) -> Result<(), Error> {
    let sql = format!(
        "SELECT c.oid, array(SELECT d.refobjid FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
    WHERE r.ev_class = c.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> c.oid),
  c.relname::text, format('%I.%I', n.nspname, c.relname), pg_get_viewdef(c.oid),
  coalesce(' WITH (' || array_to_string(c.reloptions, ', ') || ')', ''),
  (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
  (SELECT CASE WHEN r.rolsuper OR r.rolname = current_user THEN NULL ELSE quote_ident(r.rolname) END FROM pg_roles r WHERE r.oid = c.relowner),
  array(SELECT {GRANTEES} FROM aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a WHERE a.privilege_type = 'SELECT' ORDER BY 1),
  lower(pg_get_viewdef(c.oid)) ~ $1
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'v' AND {OWN}
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY c.oid"
    );
    let mut views = Vec::new();
    for row in client.query(&sql, &[&OF_ONE_SERVER]).await? {
        let (name, shown): (String, String) = (row.try_get(2)?, row.try_get(3)?);
        if row.try_get(9)? {
            let reason = "it says what is true of one server only".to_owned();
            home.skipped.push(Skipped { kind: "view".to_owned(), name, shown, reason });
            continue;
        }
        let (definition, options, columns): (String, String, String) =
            (row.try_get(4)?, row.try_get(5)?, row.try_get::<_, Option<String>>(6)?.unwrap_or_default());
        let columns = if columns.is_empty() { columns } else { format!(" ({columns})") };
        let mut sql = format!("CREATE VIEW {shown}{columns}{options} AS {}", definition.trim_end_matches(';'));
        let readers: Vec<String> = row.try_get(8)?;
        home.grants.extend(readers.iter().map(|reader| format!("GRANT SELECT ON {shown} TO {reader}")));
        if let Some(owner) = row.try_get::<_, Option<String>>(7)? {
            // Writing to a String cannot fail.
            let _ = write!(sql, "; ALTER VIEW {shown} OWNER TO {owner}");
        }
        views.push(View {
            oid: row.try_get(0)?,
            uses: row.try_get(1)?,
            object: Object { kind: "view", name, shown, sql },
        });
    }
    home.views = in_order(views);
    Ok(())
}

/// Views after those they are made of.
fn in_order(mut views: Vec<View>) -> Vec<Object> {
    let mut ordered = Vec::with_capacity(views.len());
    while !views.is_empty() {
        let waiting: Vec<u32> = views.iter().map(|view| view.oid).collect();
        let (ready, rest): (Vec<View>, Vec<View>) =
            views.into_iter().partition(|view| !view.uses.iter().any(|used| waiting.contains(used)));
        // Views cannot use each other in a circle; if they did, making them would say so.
        let stuck = ready.is_empty();
        ordered.extend(ready.into_iter().map(|view| view.object));
        views = rest;
        if stuck {
            ordered.extend(views.drain(..).map(|view| view.object));
        }
    }
    ordered
}

fn pairs(rows: &[Row]) -> Result<Vec<(String, String)>, Error> {
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<_, Option<String>>(1)?.unwrap_or_default()))).collect()
}

/// Is the declared table, or what a materialised view is made of, spread over the shards?
pub fn is_spread(schema: &str, name: &str, declared: &Declared<'_>) -> bool {
    let spread = |schema: &str, name: &str| matches!(declared.rules.placement(schema, name), Placement::Sharded { .. });
    let relation = declared.catalog.relation(schema, name);
    relation.is_some_and(|relation| relation.reads.iter().any(|(schema, name)| spread(schema, name)))
}
