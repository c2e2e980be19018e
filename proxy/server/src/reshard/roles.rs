//! Roles of a new shard's server: clients log in to each shard as themselves, so it must have all that the home shard's server has.
//!
//! Invariant: what is there is left as it is; only what is missing is made, and all of it or nothing. Passwords go along as the verifiers
//! they are stored as, if weir's account may read them. Non-goals: taking roles away, and keeping them alike later on.

use std::fmt::Write as _;

use tokio_postgres::{Client, Error};
use weir_core::sql::word::{quote_literal, quote_name};

/// Verifiers are for superusers only.
const ROLES: &str = "
SELECT rolname::text, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit,
       rolvaliduntil::text, shobj_description(oid, 'pg_authid')
FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY oid";
const VERIFIERS: &str = "SELECT rolname::text, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL";
const MEMBERS: &str = "
SELECT g.rolname::text, r.rolname::text, bool_or(m.admin_option) FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
JOIN pg_roles r ON r.oid = m.member GROUP BY 1, 2 ORDER BY 1, 2";
/// Of roles, everywhere and in this database; and of the database for all roles.
const SETTINGS: &str = "
SELECT coalesce(r.rolname::text, ''), s.setdatabase <> 0, unnest(s.setconfig) FROM pg_db_role_setting s
LEFT JOIN pg_roles r ON r.oid = s.setrole
WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) ORDER BY 1, 2, 3";
/// Who may connect to the database and create in it.
const GRANTS: &str = "
SELECT coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable FROM pg_database d
CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE d.datname = current_database() AND (a.grantee = 0 OR r.rolname !~ '^pg_') ORDER BY 1, 2";

/// A setting that is stored as a list is written as it is.
const LISTS: &[&str] = &[
    "search_path",
    "temp_tablespaces",
    "local_preload_libraries",
    "session_preload_libraries",
    "unix_socket_directories",
];

/// Makes on `target` what `home` has and it has not; `database` is its name there. What weir could not do, in sentences.
pub(super) async fn make(home: &Client, target: &Client, database: &str) -> Result<Vec<String>, Error> {
    let mut left = Vec::new();
    let mut script = roles(home, target, &mut left).await?;
    memberships(home, target, &mut script).await?;
    settings(home, target, database, &mut script).await?;
    grants(home, target, database, &mut script).await?;
    if script.is_empty() {
        return Ok(left);
    }
    // Whatever the server logs of statements, these hold verifiers.
    let quiet = "SELECT set_config(name, value, true) FROM (VALUES ('log_statement', 'none'), ('log_min_error_statement', 'panic'), \
                 ('log_min_duration_statement', '-1')) AS v(name, value) \
                 WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)";
    let made = target.batch_execute(&format!("BEGIN; {quiet}; {script} COMMIT")).await;
    if made.is_err() {
        target.batch_execute("ROLLBACK").await?;
    }
    made.map(|()| left)
}

async fn names(client: &Client) -> Result<Vec<String>, Error> {
    client.query("SELECT rolname::text FROM pg_roles", &[]).await?.iter().map(|row| row.try_get(0)).collect()
}

async fn roles(home: &Client, target: &Client, left: &mut Vec<String>) -> Result<String, Error> {
    let there = names(target).await?;
    let mut script = String::new();
    let mut without = Vec::new();
    let verifiers = home.query(VERIFIERS, &[]).await;
    let verifiers: Option<Vec<(String, String)>> = verifiers
        .ok()
        .map(|rows| rows.iter().filter_map(|row| Some((row.try_get(0).ok()?, row.try_get(1).ok()?))).collect());
    for row in home.query(ROLES, &[]).await? {
        let name: String = row.try_get(0)?;
        if there.contains(&name) {
            continue;
        }
        let words = ["SUPERUSER", "INHERIT", "CREATEROLE", "CREATEDB", "LOGIN", "REPLICATION", "BYPASSRLS"];
        let mut attributes = String::new();
        for (column, word) in (1..).zip(words) {
            let not = if row.try_get::<_, bool>(column)? { "" } else { "NO" };
            let _ = write!(attributes, " {not}{word}");
        }
        let _ = write!(attributes, " CONNECTION LIMIT {}", row.try_get::<_, i32>(8)?);
        if let Some(until) = row.try_get::<_, Option<String>>(9)? {
            let _ = write!(attributes, " VALID UNTIL {}", quote_literal(&until));
        }
        match verifiers.as_ref().map(|known| known.iter().find(|(role, _)| *role == name)) {
            Some(Some((_, verifier))) => {
                let _ = write!(attributes, " PASSWORD {}", quote_literal(verifier));
            }
            None if row.try_get(5)? => without.push(name.clone()),
            _ => {}
        }
        let _ = write!(script, "CREATE ROLE {}{attributes}; ", quote_name(&name));
        if let Some(comment) = row.try_get::<_, Option<String>>(10)? {
            let _ = write!(script, "COMMENT ON ROLE {} IS {}; ", quote_name(&name), quote_literal(&comment));
        }
    }
    if !without.is_empty() {
        left.push(format!("set the passwords of {} (weir's account may not read them)", without.join(", ")));
    }
    Ok(script)
}

async fn memberships(home: &Client, target: &Client, script: &mut String) -> Result<(), Error> {
    let read = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
    let there: Vec<(String, String, bool)> =
        target.query(MEMBERS, &[]).await?.iter().map(read).collect::<Result<_, Error>>()?;
    for row in home.query(MEMBERS, &[]).await? {
        let wanted: (String, String, bool) = read(&row)?;
        if !there.contains(&wanted) {
            let (group, member, admin) = &wanted;
            let option = if *admin { " WITH ADMIN OPTION" } else { "" };
            let _ = write!(script, "GRANT {} TO {}{option}; ", quote_name(group), quote_name(member));
        }
    }
    Ok(())
}

async fn settings(home: &Client, target: &Client, database: &str, script: &mut String) -> Result<(), Error> {
    let read = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
    let there: Vec<(String, bool, String)> =
        target.query(SETTINGS, &[]).await?.iter().map(read).collect::<Result<_, Error>>()?;
    for row in home.query(SETTINGS, &[]).await? {
        let wanted: (String, bool, String) = read(&row)?;
        let (role, here, assignment) = &wanted;
        let Some((name, value)) = assignment.split_once('=').filter(|_| !there.contains(&wanted)) else { continue };
        let value = if LISTS.contains(&name) && !value.is_empty() { value.to_owned() } else { quote_literal(value) };
        let of = match (role.as_str(), here) {
            ("", true) => format!("DATABASE {}", quote_name(database)),
            ("", false) => "ROLE ALL".to_owned(),
            (role, true) => format!("ROLE {} IN DATABASE {}", quote_name(role), quote_name(database)),
            (role, false) => format!("ROLE {}", quote_name(role)),
        };
        // A name is an identifier, with a dot in it for extensions' own.
        let name: Vec<String> = name.split('.').map(quote_name).collect();
        let _ = write!(script, "ALTER {of} SET {} = {value}; ", name.join("."));
    }
    Ok(())
}

async fn grants(home: &Client, target: &Client, database: &str, script: &mut String) -> Result<(), Error> {
    let read = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
    let of = async |client: &Client| -> Result<Vec<(String, String, bool)>, Error> {
        client.query(GRANTS, &[]).await?.iter().map(read).collect()
    };
    let (wanted, there) = (of(home).await?, of(target).await?);
    let (database, public) = (quote_name(database), |role: &str| role.is_empty());
    let name = |role: &str| if public(role) { "PUBLIC".to_owned() } else { quote_name(role) };
    for (role, privilege, option) in wanted.iter().filter(|grant| !there.contains(grant)) {
        let option = if *option { " WITH GRANT OPTION" } else { "" };
        let _ = write!(script, "GRANT {privilege} ON DATABASE {database} TO {}{option}; ", name(role));
    }
    // What everybody may on a new server and may not on the old one.
    for (role, privilege, _) in there.iter().filter(|grant| public(&grant.0) && !wanted.contains(grant)) {
        let _ = write!(script, "REVOKE {privilege} ON DATABASE {database} FROM {}; ", name(role));
    }
    Ok(())
}
