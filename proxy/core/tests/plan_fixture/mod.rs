//! The storefront's tables on a few shards, and a plan as text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use weir_core::fresh::{Dependency, TableHash};
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::plan::{Access, Compiled, Datum, Plan, Schema, Target, Values, compile, explain};
use weir_core::sql::class::classify;
use weir_core::sql::lex::lex;
use weir_core::sql::normal::{Normal, normalize};
use weir_core::topology::catalog::{Catalog, Column, Relation, RelationKind, Volatility};
use weir_core::topology::hash::hash_bytes_extended;
use weir_core::topology::{KeyType, Placement, SlotMap, TableRules, Topology};

pub struct Fixture {
    pub topology: Topology,
    pub catalog: Catalog,
    pub search_path: Vec<Box<str>>,
}

const INT8: u32 = 20;
const INT4: u32 = 23;
const TEXT: u32 = 25;
const BOOL: u32 = 16;
const BYTEA: u32 = 17;
const FLOAT4: u32 = 700;
const TIMESTAMPTZ: u32 = 1184;
const UUID: u32 = 2950;
const JSONB: u32 = 3802;
const TSVECTOR: u32 = 3614;

type Table = (&'static str, &'static [(&'static str, u32)]);

const TABLES: &[Table] = &[
    ("categories", &[("category_id", INT4), ("parent_id", INT4), ("slug", TEXT), ("name", TEXT)]),
    (
        "products",
        &[
            ("product_id", INT8),
            ("category_id", INT4),
            ("sku", TEXT),
            ("name", TEXT),
            ("brand", TEXT),
            ("price_cents", INT8),
            ("active", BOOL),
            ("tsv", TSVECTOR),
        ],
    ),
    ("user_emails", &[("email", TEXT), ("user_id", INT8), ("claimed_at", TIMESTAMPTZ)]),
    ("inventory", &[("product_id", INT8), ("available", INT4)]),
    (
        "stock_holds",
        &[
            ("product_id", INT8),
            ("order_id", UUID),
            ("user_id", INT8),
            ("qty", INT4),
            ("state", TEXT),
            ("expires_at", TIMESTAMPTZ),
        ],
    ),
    ("users", &[("user_id", INT8), ("email", TEXT), ("name", TEXT), ("pw_hash", TEXT), ("created_at", TIMESTAMPTZ)]),
    ("sessions", &[("user_id", INT8), ("token_hash", BYTEA), ("expires_at", TIMESTAMPTZ)]),
    ("cart_items", &[("user_id", INT8), ("product_id", INT8), ("qty", INT4)]),
    (
        "orders",
        &[("user_id", INT8), ("order_id", UUID), ("status", TEXT), ("total_cents", INT8), ("created_at", TIMESTAMPTZ)],
    ),
    (
        "order_items",
        &[
            ("user_id", INT8),
            ("order_id", UUID),
            ("product_id", INT8),
            ("name", TEXT),
            ("qty", INT4),
            ("price_cents", INT8),
        ],
    ),
    (
        "order_events",
        &[
            ("user_id", INT8),
            ("order_id", UUID),
            ("version", INT4),
            ("kind", TEXT),
            ("data", JSONB),
            ("at", TIMESTAMPTZ),
        ],
    ),
    (
        "payments",
        &[("user_id", INT8), ("order_id", UUID), ("provider_ref", TEXT), ("amount_cents", INT8), ("state", TEXT)],
    ),
    ("webhook_events", &[("user_id", INT8), ("event_id", TEXT)]),
    ("idempotency", &[("user_id", INT8), ("key", TEXT), ("request_hash", BYTEA), ("order_id", UUID)]),
    (
        "outbox",
        &[
            ("user_id", INT8),
            ("event_id", UUID),
            ("topic", TEXT),
            ("payload", JSONB),
            ("lease_until", TIMESTAMPTZ),
            ("attempts", INT4),
            ("done_at", TIMESTAMPTZ),
            ("created_at", TIMESTAMPTZ),
        ],
    ),
    // Not the storefront's: a table with one home, a view, and a sharded table by uuid.
    ("settings", &[("name", TEXT), ("value", TEXT)]),
    ("recent", &[("user_id", INT8), ("n", INT8)]),
    ("devices", &[("device_id", UUID), ("label", TEXT), ("weight", FLOAT4)]),
];

const SHARDED: &[(&str, &str, KeyType)] = &[
    ("user_emails", "email", KeyType::Text),
    ("inventory", "product_id", KeyType::Int),
    ("stock_holds", "product_id", KeyType::Int),
    ("users", "user_id", KeyType::Int),
    ("sessions", "user_id", KeyType::Int),
    ("cart_items", "user_id", KeyType::Int),
    ("orders", "user_id", KeyType::Int),
    ("order_items", "user_id", KeyType::Int),
    ("order_events", "user_id", KeyType::Int),
    ("payments", "user_id", KeyType::Int),
    ("webhook_events", "user_id", KeyType::Int),
    ("idempotency", "user_id", KeyType::Int),
    ("outbox", "user_id", KeyType::Int),
    ("devices", "device_id", KeyType::Uuid),
    // Declared, but the catalogue does not have it (yet).
    ("fresh_table", "user_id", KeyType::Int),
];

const IMMUTABLE: &[&str] = &[
    "abs", "array_agg", "avg", "bool_and", "bool_or", "count", "every", "json_agg", "jsonb_agg", "lower", "max", "min",
    "round", "row_number", "rank", "stddev", "string_agg", "sum", "ts_rank", "upper", "generate_series", "unnest",
    "length", "percentile_cont", "date_part",
];
const STABLE: &[&str] = &["date_trunc", "now", "to_char", "version", "websearch_to_tsquery", "txid_current", "table_to_xml"];
const VOLATILE: &[&str] = &["clock_timestamp", "gen_random_uuid", "nextval", "pg_notify", "random", "setval"];

impl Fixture {
    /// Shard n of `shards` (a power of two) owns the n-th part of the slots.
    pub fn storefront(shards: u16) -> Self {
        let per_shard = Slot::COUNT / usize::from(shards);
        let owners = (0..Slot::COUNT).map(|slot| ShardId((slot / per_shard) as u16)).collect();
        let mut rules = TableRules::default();
        for (table, key, key_type) in SHARDED {
            rules.insert("public", table, Placement::Sharded { key: (*key).into(), key_type: *key_type });
        }
        rules.insert("public", "categories", Placement::Reference);
        rules.insert("public", "products", Placement::Reference);
        let names: Vec<Box<str>> = (1..=shards).map(|number| format!("shard{number}").into()).collect();
        let topology = Topology {
            epoch: Epoch(1),
            shards: names.into(),
            slots: SlotMap::new(owners).expect("every slot has an owner"),
            tables: Arc::new(rules),
            home: ShardId(0),
        };
        Fixture { topology, catalog: catalog(), search_path: vec!["public".into()] }
    }

    pub fn compile(&self, sql: &str) -> (Compiled, Normal) {
        let mut tokens = Vec::new();
        let mut normal = Normal::default();
        lex(sql, &mut tokens).expect("statement lexes");
        normalize(sql, &tokens, &mut normal);
        let class = classify(sql, &tokens);
        let schema = Schema {
            rules: &self.topology.tables,
            catalog: &self.catalog,
            search_path: &self.search_path,
            shards: self.topology.shard_count(),
        };
        (compile(&normal, &class, sql, &schema), normal)
    }
}

fn catalog() -> Catalog {
    let mut catalog = Catalog { version: 1, ..Catalog::default() };
    let mut relations = BTreeMap::new();
    for (table, columns) in TABLES {
        let columns = columns
            .iter()
            .map(|(name, type_oid)| Column {
                name: (*name).into(),
                type_oid: *type_oid,
                // The database's collation is not C; one column is declared COLLATE "C".
                byte_order: *type_oid != TEXT || *name == "slug",
                not_null: false,
            })
            .collect();
        let kind = if *table == "recent" { RelationKind::View } else { RelationKind::PlainTable };
        let relation = Relation { kind, columns, writes_spread: *table == "users", unique_columns: Vec::new() };
        relations.insert((*table).into(), relation);
    }
    catalog.relations.insert("public".into(), relations);
    for (names, volatility) in
        [(IMMUTABLE, Volatility::Immutable), (STABLE, Volatility::Stable), (VOLATILE, Volatility::Volatile)]
    {
        for name in names {
            catalog.builtin_functions.insert((*name).into(), volatility);
        }
    }
    catalog.user_functions.insert("do_something".into());
    catalog
}

/// The plan of a statement with text parameters, in a few lines.
pub fn describe(fixture: &Fixture, sql: &str, params: &[Option<&str>]) -> String {
    let (compiled, normal) = fixture.compile(sql);
    let datums: Vec<Datum<'_>> =
        params.iter().map(|param| param.map_or(Datum::Null, |text| Datum::Text(text.as_bytes()))).collect();
    let values = Values { params: &datums, sql, literals: &normal.literals };
    let mut text = String::new();
    match compiled.template.bind(&values, &fixture.topology) {
        Err(error) => {
            let _ = writeln!(text, "refused {}: {}", error.sqlstate, error.message);
            for (name, part) in [("detail", &error.detail), ("hint", &error.hint)] {
                if let Some(part) = part {
                    let _ = writeln!(text, "  {name}: {part}");
                }
            }
        }
        Ok(plan) => plan_text(fixture, sql, &compiled, &plan, &mut text),
    }
    if !compiled.structural.is_empty() {
        let _ = writeln!(text, "  structural: {:?}", compiled.structural);
    }
    text
}

fn plan_text(fixture: &Fixture, sql: &str, compiled: &Compiled, plan: &Plan, text: &mut String) {
    let rows: BTreeMap<String, String> = explain(plan, &fixture.topology).into_iter().collect();
    let access = match plan.access {
        Access::Read => "read".to_owned(),
        Access::PrimaryRead(reason) => format!("primary read ({})", reason.as_str()),
        Access::Write => "write".to_owned(),
    };
    let shards = if plan.target == Target::All || plan.target == Target::Any { "" } else { &rows["shards"] };
    let _ = writeln!(text, "{} {shards}, {access}", rows["target"]);
    let _ = writeln!(text, "  why: {}", rows["reason"]);
    if plan.merge.is_some() {
        let _ = writeln!(text, "  merge: {}", rows["merge"]);
        let rewrite = compiled.template.rewrite().expect("a merged plan has a text for the shards");
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("statement lexes");
        let rewritten = rewrite.apply(sql, &tokens);
        if rewritten != sql {
            let _ = writeln!(text, "  shards: {rewritten}");
        }
    }
    for (name, dependencies) in [("reads", &plan.reads), ("writes", &plan.writes)] {
        if !dependencies.is_empty() {
            let shown: Vec<String> = dependencies.iter().map(dependency).collect();
            let _ = writeln!(text, "  {name}: {}", shown.join(" "));
        }
    }
    let cache = plan.cacheable.map_or_else(|reason| format!("no ({})", reason.as_str()), |()| "yes".to_owned());
    let _ = writeln!(text, "  cache: {cache}");
}

fn dependency(dependency: &Dependency) -> String {
    let table = |hash: &TableHash| {
        let named = TABLES.iter().map(|table| table.0).chain(["fresh_table"]);
        let found = named.into_iter().find(|name| hash_bytes_extended(format!("public.{name}").as_bytes(), 0) == hash.0);
        found.unwrap_or("?").to_owned()
    };
    match dependency {
        Dependency::Anything => "G".to_owned(),
        Dependency::Table(hash) => format!("A({})", table(hash)),
        Dependency::Keyless(hash) => format!("B({})", table(hash)),
        Dependency::Key(hash, key) => format!("K({},{:04x})", table(hash), key.0 >> 48),
    }
}
