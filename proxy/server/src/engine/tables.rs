//! The relations of the home shard that become foreign tables of the fallback engine.

use tokio_postgres::{Client, Error};
use weir_core::engine::{Column, Table};

use super::read::{Declared, is_spread};

/// money, whose text depends on lc_monetary; regproc, regoper, regclass, regtype and so on, whose text is a name of the catalogue.
const OF_ONE_SERVER: &[u32] = &[790, 24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4089, 4096, 4191];

/// Everything with rows but views; what belongs to an extension describes one server.
pub async fn read(
    client: &Client,
    own_schemas: &str,
    grantees: &str,
    declared: &Declared<'_>,
) -> Result<Vec<Table>, Error> {
    let sql = format!(
        "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relrowsecurity, c.relispartition,
  EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'),
  array(SELECT {grantees} FROM aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a WHERE a.privilege_type = 'SELECT' ORDER BY 1),
  array(SELECT quote_ident(t.attname) FROM pg_attribute t, aclexplode(t.attacl) a
        WHERE t.attrelid = c.oid AND NOT t.attisdropped AND a.privilege_type = 'SELECT' ORDER BY t.attnum, a.grantee),
  array(SELECT {grantees} FROM pg_attribute t, aclexplode(t.attacl) a
        WHERE t.attrelid = c.oid AND NOT t.attisdropped AND a.privilege_type = 'SELECT' ORDER BY t.attnum, a.grantee),
  array(SELECT t.attname::text FROM pg_attribute t WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped ORDER BY t.attnum),
  array(SELECT format('%I %s%s%s', t.attname, format_type(t.atttypid, t.atttypmod),
          CASE WHEN t.attcollation <> y.typcollation
               THEN (SELECT format(' COLLATE %I.%I', k.nspname, o.collname) FROM pg_collation o
                     JOIN pg_namespace k ON k.oid = o.collnamespace WHERE o.oid = t.attcollation) ELSE '' END,
          CASE WHEN t.attnotnull THEN ' NOT NULL' ELSE '' END)
        FROM pg_attribute t JOIN pg_type y ON y.oid = t.atttypid
        WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped ORDER BY t.attnum),
  array(SELECT coalesce(nullif(y.typbasetype, 0), y.oid) FROM pg_attribute t JOIN pg_type y ON y.oid = t.atttypid
        WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped ORDER BY t.attnum)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm', 'f', 'S') AND c.relpersistence <> 't' AND {own_schemas} ORDER BY c.oid"
    );
    let rows = client.query(&sql, &[]).await?;
    rows.iter()
        .map(|row| {
            let (schema, name): (String, String) = (row.try_get(1)?, row.try_get(2)?);
            let kind: &str = row.try_get(3)?;
            let refused = if kind == "S" {
                Some("it is a sequence")
            } else if row.try_get(6)? {
                Some("it belongs to an extension and describes one server")
            } else if row.try_get(4)? {
                Some("it has row security, and the hub reads the shards as one user for all")
            } else if row.try_get(5)? {
                Some("it is a partition of another table")
            } else if kind == "m" && is_spread(&schema, &name, declared) {
                Some("it is a materialized view of sharded tables, which holds one shard's rows only")
            } else if row.try_get::<_, Vec<u32>>(12)?.iter().any(|oid| OF_ONE_SERVER.contains(oid)) {
                Some("a column's type is read by names or settings of one server (money, regclass and its like)")
            } else {
                None
            };
            let (restricted, readers): (Vec<String>, Vec<String>) = (row.try_get(8)?, row.try_get(9)?);
            let (names, definitions, types): (Vec<String>, Vec<String>, Vec<u32>) =
                (row.try_get(10)?, row.try_get(11)?, row.try_get(12)?);
            let columns = names.into_iter().zip(definitions).zip(types);
            Ok(Table {
                oid: row.try_get(0)?,
                schema,
                name,
                columns: columns.map(|((name, definition), type_oid)| Column { name, definition, type_oid }).collect(),
                readers: row.try_get(7)?,
                column_readers: restricted.into_iter().zip(readers).collect(),
                refused: refused.map(str::to_owned),
            })
        })
        .collect()
}
