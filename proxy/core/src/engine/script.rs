//! The text itself. It is one transaction's worth and starts from nothing: whatever the database held is dropped first.

use std::fmt::Write as _;

use super::{Home, Object, Role, SCHEMA, Skipped, Table, Target};
use crate::id::Slot;
use crate::sql::word::{quote_literal, quote_name};
use crate::topology::{KeyType, Placement, in_sql};

/// What Postgres adds to the hash of the first partition key (hash_combine64 in src/include/common/hashfn.h with a = 0); taken off
/// again, the remainder is the shard's number.
const COMBINED: u64 = 0x49a0_f4dd_15e5_a8e3;

/// Waits until no statement runs on the engine, lets none in until the end, and takes everything away.
const EMPTY: &str = r"
SET LOCAL search_path = '';
SET LOCAL check_function_bodies = off;
SET LOCAL client_min_messages = error;
DO $$ DECLARE one record; BEGIN
  IF to_regclass('weir_engine.state') IS NOT NULL THEN LOCK TABLE weir_engine.state IN ACCESS EXCLUSIVE MODE; END IF;
  FOR one IN SELECT extname FROM pg_extension WHERE extname NOT IN ('plpgsql', 'postgres_fdw') LOOP
    EXECUTE format('DROP EXTENSION IF EXISTS %I CASCADE', one.extname);
  END LOOP;
  FOR one IN SELECT srvname FROM pg_foreign_server LOOP
    EXECUTE format('DROP SERVER %I CASCADE', one.srvname);
  END LOOP;
  FOR one IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'weir_fdw') LOOP
    EXECUTE format('DROP SCHEMA %I CASCADE', one.nspname);
  END LOOP;
  FOR one IN SELECT rolname FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole
             WHERE s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) LOOP
    EXECUTE format('ALTER ROLE %I IN DATABASE %I RESET ALL', one.rolname, current_database());
  END LOOP;
END $$;
CREATE SCHEMA IF NOT EXISTS weir_fdw;
CREATE EXTENSION IF NOT EXISTS postgres_fdw SCHEMA weir_fdw;
CREATE SCHEMA weir_engine;
GRANT USAGE ON SCHEMA weir_engine TO PUBLIC;
CREATE TABLE weir_engine.state (token text NOT NULL, digest text NOT NULL, epoch bigint NOT NULL, built timestamptz NOT NULL DEFAULT now());
GRANT SELECT (token) ON weir_engine.state TO PUBLIC;
CREATE TABLE weir_engine.skipped (kind text NOT NULL, name text NOT NULL, shown text NOT NULL, reason text NOT NULL);
CREATE FUNCTION weir_engine.attempt(kind text, name text, shown text, sql text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE sql;
EXCEPTION WHEN OTHERS THEN
  INSERT INTO weir_engine.skipped VALUES (kind, name, shown, SQLERRM);
END $$;
CREATE FUNCTION weir_engine.is_ours(role text) RETURNS boolean LANGUAGE sql AS $$
  SELECT coalesce((SELECT shobj_description(oid, 'pg_authid') = 'made by weir for its fallback engine' FROM pg_roles WHERE rolname = role), false)
$$;
CREATE FUNCTION weir_engine.role(name text, attributes text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE one record;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
    EXECUTE format('CREATE ROLE %I', name);
    EXECUTE format('COMMENT ON ROLE %I IS %L', name, 'made by weir for its fallback engine');
  END IF;
  IF weir_engine.is_ours(name) THEN
    EXECUTE format('ALTER ROLE %I %s', name, attributes);
    FOR one IN SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = name LOOP
      EXECUTE format('REVOKE %I FROM %I', one.rolname, name);
    END LOOP;
  END IF;
END $$;
CREATE FUNCTION weir_engine.member(of_group text, name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF weir_engine.is_ours(name) AND (weir_engine.is_ours(of_group) OR of_group = 'pg_read_all_data') THEN
    EXECUTE format('GRANT %I TO %I', of_group, name);
  END IF;
END $$;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA weir_engine FROM PUBLIC;
";

/// How the keys of each type are hashed: by the functions that give a key its slot.
const OPERATOR_CLASSES: &str = r"
CREATE FUNCTION weir_engine.part_int8(bigint, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS 'SELECT weir_engine.part(hashint8extended($1, 0))';
CREATE FUNCTION weir_engine.part_int4(integer, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS 'SELECT weir_engine.part(hashint8extended($1, 0))';
CREATE FUNCTION weir_engine.part_int2(smallint, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS 'SELECT weir_engine.part(hashint8extended($1, 0))';
CREATE FUNCTION weir_engine.part_text(text, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS 'SELECT weir_engine.part(hashtextextended($1, 0))';
CREATE FUNCTION weir_engine.part_uuid(uuid, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS 'SELECT weir_engine.part(uuid_hash_extended($1, 0))';
CREATE OPERATOR FAMILY weir_engine.key_int USING hash;
CREATE OPERATOR CLASS weir_engine.key_int8 FOR TYPE int8 USING hash FAMILY weir_engine.key_int AS
  OPERATOR 1 pg_catalog.= (int8, int8), FUNCTION 1 hashint8(int8), FUNCTION 2 weir_engine.part_int8(int8, int8);
CREATE OPERATOR CLASS weir_engine.key_int4 FOR TYPE int4 USING hash FAMILY weir_engine.key_int AS
  OPERATOR 1 pg_catalog.= (int4, int4), FUNCTION 1 hashint4(int4), FUNCTION 2 weir_engine.part_int4(int4, int8);
CREATE OPERATOR CLASS weir_engine.key_int2 FOR TYPE int2 USING hash FAMILY weir_engine.key_int AS
  OPERATOR 1 pg_catalog.= (int2, int2), FUNCTION 1 hashint2(int2), FUNCTION 2 weir_engine.part_int2(int2, int8);
ALTER OPERATOR FAMILY weir_engine.key_int USING hash ADD
  OPERATOR 1 pg_catalog.= (int8, int4), OPERATOR 1 pg_catalog.= (int4, int8), OPERATOR 1 pg_catalog.= (int8, int2),
  OPERATOR 1 pg_catalog.= (int2, int8), OPERATOR 1 pg_catalog.= (int4, int2), OPERATOR 1 pg_catalog.= (int2, int4);
CREATE OPERATOR CLASS weir_engine.key_text FOR TYPE text USING hash AS
  OPERATOR 1 pg_catalog.= (text, text), FUNCTION 1 hashtext(text), FUNCTION 2 weir_engine.part_text(text, int8);
CREATE OPERATOR CLASS weir_engine.key_uuid FOR TYPE uuid USING hash AS
  OPERATOR 1 pg_catalog.= (uuid, uuid), FUNCTION 1 uuid_hash(uuid), FUNCTION 2 weir_engine.part_uuid(uuid, int8);
";

/// Everything but the row in `weir_engine.state` that makes the result count.
pub fn script(home: &Home, target: &Target<'_>) -> String {
    let mut text = Text(EMPTY.to_owned());
    text.settings(home, target);
    text.roles(home, target);
    for (schema, users) in &home.schemas {
        text.run(&format!("CREATE SCHEMA IF NOT EXISTS {}", quote_name(schema)));
        for user in users {
            text.attempt("grant", "", schema, &format!("GRANT USAGE ON SCHEMA {} TO {user}", quote_name(schema)));
        }
    }
    home.needed.iter().for_each(|sql| text.run(sql));
    home.extensions.iter().chain(&home.types).for_each(|object| text.object(object));
    text.servers(target);
    if target.partitions {
        text.run(&slot_function(target));
        text.0.push_str(OPERATOR_CLASSES);
    }
    home.tables.iter().for_each(|table| text.table(table, target));
    home.functions.iter().chain(&home.views).for_each(|object| text.object(object));
    text.run(&format!("COMMENT ON TABLE {SCHEMA}.state IS {}", quote_literal(&home.keys.join("\n"))));
    home.grants.iter().for_each(|sql| text.attempt("grant", "", sql, sql));
    home.skipped.iter().for_each(|skipped| text.skip(skipped));
    text.0.push_str("DROP FUNCTION weir_engine.attempt, weir_engine.role, weir_engine.member, weir_engine.is_ours;\n");
    text.0
}

/// `part(hash)`: the owner of the hash, so that hashing once more by Postgres leaves the shard as the remainder.
fn slot_function(target: &Target<'_>) -> String {
    let mut map = String::with_capacity(4 * Slot::COUNT);
    for owner in target.slots.owners() {
        // Writing to a String cannot fail.
        let _ = write!(map, "{:04x}", owner.0);
    }
    let by_slot = format!(
        "get_byte(''\\x{map}''::bytea, (2 * (($1 >> 52) & 4095))::integer) * 256::bigint \
         + get_byte(''\\x{map}''::bytea, (2 * (($1 >> 52) & 4095))::integer + 1)"
    );
    let mut owner = by_slot.clone();
    if !target.slots.isolated().is_empty() {
        let isolated = target.slots.isolated().iter();
        let cases = isolated.map(|key| format!("WHEN ''{}''::bigint THEN {}::bigint", key.hash as i64, key.owner.0));
        owner = format!("CASE $1 {} ELSE {by_slot} END", cases.collect::<Vec<_>>().join(" "));
    }
    format!(
        "CREATE FUNCTION {SCHEMA}.part(bigint) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS \
         'SELECT {owner} - {COMBINED}'"
    )
}

struct Text(String);

impl Text {
    fn run(&mut self, sql: &str) {
        self.0.push_str(sql);
        self.0.push_str(";\n");
    }

    /// A statement whose failure is noted and does no harm.
    fn attempt(&mut self, kind: &str, name: &str, shown: &str, sql: &str) {
        let [kind, name, shown, sql] = [kind, name, shown, sql].map(quote_literal);
        self.run(&format!("SELECT {SCHEMA}.attempt({kind}, {name}, {shown}, {sql})"));
    }

    fn object(&mut self, object: &Object) {
        self.attempt(object.kind, &object.name, &object.shown, &object.sql);
    }

    fn skip(&mut self, skipped: &Skipped) {
        let fields = [&skipped.kind, &skipped.name, &skipped.shown, &skipped.reason].map(|field| quote_literal(field));
        self.run(&format!("INSERT INTO {SCHEMA}.skipped VALUES ({})", fields.join(", ")));
    }

    /// Sessions there begin as they do on the home shard, and can only read.
    fn settings(&mut self, home: &Home, target: &Target<'_>) {
        let database = quote_name(target.database);
        self.run(&format!("ALTER DATABASE {database} RESET ALL"));
        self.run(&format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"));
        self.run(&format!("GRANT CONNECT ON DATABASE {database} TO PUBLIC"));
        let own = [
            ("default_transaction_read_only", "on".to_owned()),
            ("enable_partitionwise_join", "on".to_owned()),
            ("enable_partitionwise_aggregate", "on".to_owned()),
            ("jit", "off".to_owned()),
            ("work_mem", format!("{}kB", target.work_mem_kib)),
            ("temp_file_limit", format!("{}kB", target.temp_kib_max)),
        ];
        let of_home = home.settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
        for (name, value) in of_home.chain(own) {
            let sql = format!("ALTER DATABASE {database} SET {name} = {}", setting(name, &value));
            self.attempt("setting", "", name, &sql);
        }
    }

    fn roles(&mut self, home: &Home, target: &Target<'_>) {
        for role in &home.roles {
            let [name, attributes] = [&role.name, &attributes(role)].map(|text| quote_literal(text));
            self.attempt("role", "", &role.name, &format!("SELECT {SCHEMA}.role({name}, {attributes})"));
        }
        for role in home.roles.iter().filter(|role| role.reads_all) {
            let sql = format!("SELECT {SCHEMA}.member('pg_read_all_data', {})", quote_literal(&role.name));
            self.attempt("membership", "", &role.name, &sql);
        }
        for (group, member) in &home.memberships {
            let sql = format!("SELECT {SCHEMA}.member({}, {})", quote_literal(group), quote_literal(member));
            self.attempt("membership", "", member, &sql);
        }
        for (role, assignment) in &home.role_settings {
            let Some((name, value)) = assignment.split_once('=') else { continue };
            let value = setting(name, value);
            let database = quote_name(target.database);
            let sql = format!("ALTER ROLE {} IN DATABASE {database} SET {name} = {value}", quote_name(role));
            self.attempt("setting", "", role, &sql);
        }
    }

    fn servers(&mut self, target: &Target<'_>) {
        for (number, shard) in target.shards.iter().enumerate() {
            let [host, database, user] = [&shard.host, &shard.database, &shard.user].map(|text| quote_literal(text));
            let authority = shard.sslrootcert.as_deref().map(quote_literal);
            let authority = authority.map_or(String::new(), |file| format!(", sslrootcert {file}"));
            self.run(&format!(
                "CREATE SERVER weir_shard{number} FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host {host}, port '{}', \
                 dbname {database}, sslmode '{}'{authority}, connect_timeout '5', application_name 'weir engine', fetch_size '5000', \
                 async_capable 'true', use_remote_estimate 'false', fdw_startup_cost '200', fdw_tuple_cost '0.5', \
                 updatable 'false', truncatable 'false')",
                shard.port, shard.sslmode,
            ));
            let password =
                shard.password.as_ref().map_or(String::new(), |text| format!(", password {}", quote_literal(text)));
            // The shards let weir in, not the client: who may read what is decided here, by the same grants.
            let trusted = if target.superuser { ", password_required 'false'" } else { "" };
            self.run(&format!(
                "CREATE USER MAPPING FOR PUBLIC SERVER weir_shard{number} OPTIONS (user {user}{password}{trusted})"
            ));
            if shard.sslrootcert.is_some() {
                let origin = "OPTIONS (schema_name 'pg_catalog', table_name 'pg_database')";
                self.run(&format!(
                    "CREATE FOREIGN TABLE {} (oid oid) SERVER weir_shard{number} {origin}",
                    reach(number)
                ));
            }
        }
    }

    fn table(&mut self, table: &Table, target: &Target<'_>) {
        let shown = format!("{}.{}", table.schema, table.name);
        if let Some(reason) = &table.refused {
            let (kind, name) = ("table".to_owned(), table.name.clone());
            return self.skip(&Skipped { kind, name, shown, reason: reason.clone() });
        }
        let name = format!("{}.{}", quote_name(&table.schema), quote_name(&table.name));
        let sql = match target.rules.placement(&table.schema, &table.name) {
            Placement::Sharded { key, key_type } => sharded(table, &name, key, (*key_type, target)),
            Placement::Reference | Placement::Global => foreign(table, &name, target.home),
        };
        self.attempt("table", &table.name, &shown, &sql);
        // Apart, since a role may be missing there; then it may not read, and nothing else is different.
        for reader in &table.readers {
            self.attempt("grant", "", &shown, &format!("GRANT SELECT ON {name} TO {reader}"));
        }
        for (column, reader) in &table.column_readers {
            self.attempt("grant", "", &shown, &format!("GRANT SELECT ({column}) ON {name} TO {reader}"));
        }
    }
}

/// A table that any role may read there: reading it shows that the hub's server can log in to the shard.
pub fn reach(shard: usize) -> String {
    format!("{SCHEMA}.reach{shard}")
}

/// A foreign table of one shard.
fn foreign(table: &Table, name: &str, shard: usize) -> String {
    let columns: Vec<&str> = table.columns.iter().map(|column| &*column.definition).collect();
    format!("CREATE FOREIGN TABLE {name} ({}) {}", columns.join(", "), origin(table, shard))
}

fn origin(table: &Table, shard: usize) -> String {
    let [schema, name] = [&table.schema, &table.name].map(|text| quote_literal(text));
    format!("SERVER weir_shard{shard} OPTIONS (schema_name {schema}, table_name {name})")
}

/// All shards' rows under one name.
fn sharded(table: &Table, name: &str, key: &str, (key_type, target): (KeyType, &Target<'_>)) -> String {
    let shards = target.shards.len();
    let part = |shard: usize| format!("{SCHEMA}.r{}_{shard}", table.oid);
    // Partitions would be trusted to hold what belongs in them, and the wrapper cannot leave rows of a table out.
    if !target.partitions || target.guests.iter().any(Option::is_some) {
        let parts: Vec<String> = (0..shards).map(|shard| foreign(table, &part(shard), shard)).collect();
        let columns: Vec<String> = table.columns.iter().map(|column| quote_name(&column.name)).collect();
        let columns = columns.join(", ");
        let own = |shard: usize| match target.guests.get(shard) {
            Some(Some(guests)) => format!(" WHERE {}", in_sql::outside(guests, &quote_name(key), key_type)),
            _ => String::new(),
        };
        let rows = (0..shards).map(|shard| format!("SELECT {columns} FROM {}{}", part(shard), own(shard)));
        let rows: Vec<String> = rows.collect();
        return format!("{}; CREATE VIEW {name} AS {}", parts.join("; "), rows.join(" UNION ALL "));
    }
    let type_oid = table.columns.iter().find(|column| column.name == key).map_or(0, |column| column.type_oid);
    let class = match (key_type, type_oid) {
        (KeyType::Int, 21) => "key_int2",
        (KeyType::Int, 23) => "key_int4",
        (KeyType::Int, _) => "key_int8",
        (KeyType::Text, _) => "key_text",
        (KeyType::Uuid, _) => "key_uuid",
    };
    let columns: Vec<&str> = table.columns.iter().map(|column| &*column.definition).collect();
    let mut sql = format!(
        "CREATE TABLE {name} ({}) PARTITION BY HASH ({} {SCHEMA}.{class})",
        columns.join(", "),
        quote_name(key)
    );
    for shard in 0..shards {
        let _ = write!(
            sql,
            "; CREATE FOREIGN TABLE {} PARTITION OF {name} FOR VALUES WITH (MODULUS {shards}, REMAINDER {shard}) {}",
            part(shard),
            origin(table, shard)
        );
    }
    sql
}

fn attributes(role: &Role) -> String {
    let word = |yes: bool, word: &str| if yes { word.to_owned() } else { format!("NO{word}") };
    let password = role.verifier.as_deref().map_or("NULL".to_owned(), quote_literal);
    let until = quote_literal(role.valid_until.as_deref().unwrap_or("infinity"));
    format!("{} {} PASSWORD {password} VALID UNTIL {until}", word(role.login, "LOGIN"), word(role.inherit, "INHERIT"))
}

/// A value behind SET. Lists of names are stored as they are written (GUC_LIST_QUOTE in src/backend/utils/misc/guc.c).
fn setting(name: &str, value: &str) -> String {
    const LISTS: &[&str] = &[
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    ];
    if LISTS.contains(&name) && !value.is_empty() { value.to_owned() } else { quote_literal(value) }
}
