//! Says what weir learns of statements: reads them from standard input, each ended by a zero byte, and prints a line for each.
//!
//! A line is tab-separated: `unparsed`, reason; or `facts`, verb, tables (`name`, with `+` in front where rows are written),
//! functions, and which of `locks`, `writes-in-with` and `server-bound` hold. For tests/compat/facts.py, which compares it with Postgres's own
//! grammar.

use std::io::{Read as _, Write as _};

use weir_core::plan::Schema;
use weir_core::sql::lex::lex;
use weir_core::sql::normal::{Normal, normalize};
use weir_core::sql::parse;
use weir_core::topology::TableRules;
use weir_core::topology::catalog::Catalog;

fn main() -> std::io::Result<()> {
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    let (rules, catalog) = (TableRules::default(), Catalog::default());
    let schema = Schema {
        rules: &rules,
        catalog: &catalog,
        search_path: &["public".into()],
        width: weir_core::topology::Width::Several,
    };
    let mut out = std::io::stdout().lock();
    for statement in input.split(|byte| *byte == 0).filter(|statement| !statement.is_empty()) {
        writeln!(out, "{}", line(&String::from_utf8_lossy(statement), &schema))?;
    }
    Ok(())
}

fn line(sql: &str, schema: &Schema<'_>) -> String {
    let (mut tokens, mut normal) = (Vec::new(), Normal::default());
    if lex(sql, &mut tokens).is_err() {
        return "unparsed\tit cannot be cut into tokens".to_owned();
    }
    normalize(sql, &tokens, &mut normal);
    let mut lifted = Vec::new();
    if lex(&normal.text, &mut lifted).is_err() {
        return "unparsed\tits normal form cannot be cut into tokens".to_owned();
    }
    let facts = match parse::facts(&normal.text, &lifted, normal.params, schema) {
        Ok(facts) => facts,
        Err(parse::Unparsed(why)) => return format!("unparsed\t{why}"),
    };
    let table = |instance: &weir_core::sql::facts::Instance| {
        let written = if instance.usage.is_write() { "+" } else { "" };
        format!("{written}{}", instance.table.name)
    };
    let tables: Vec<String> = facts.instances.iter().map(table).collect();
    let functions: Vec<&str> = facts.functions.iter().map(|function| &*function.name).collect();
    let holds =
        [(facts.locks_rows, "locks"), (facts.writes_in_with, "writes-in-with"), (facts.server_bound, "server-bound")];
    let holds: Vec<&str> = holds.into_iter().filter_map(|(holds, name)| holds.then_some(name)).collect();
    format!("facts\t{:?}\t{}\t{}\t{}", facts.verb, tables.join(" "), functions.join(" "), holds.join(" "))
}
