//! The storefront's tables on a few shards, and a plan as text.

use std::collections::BTreeMap;
use std::sync::Arc;

use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::plan::{Compiled, Schema, compile};
use weir_core::sql::class::classify;
use weir_core::sql::lex::lex;
use weir_core::sql::normal::{Normal, normalize};
use weir_core::topology::catalog::{
    Catalog, Column, DefaultKind, Overload, Relation, RelationKind, RelationName, UserFunction, Volatility,
};
use weir_core::topology::{KeyType, Placement, Roster, ShardState, SlotMap, TableRules, Topology};

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

pub const TABLES: &[Table] = &[
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
    // A view of reference tables, a table with a trigger, a view of a table with one home, one without a table, and a partition of a sharded table.
    ("listing", &[("product_id", INT8), ("category", TEXT)]),
    ("audited", &[("name", TEXT)]),
    ("features", &[("name", TEXT)]),
    ("constants", &[("pi", FLOAT4)]),
    ("orders_2024", &[("user_id", INT8), ("order_id", UUID)]),
    // A reference table with defaults that differ between servers.
    ("brands", &[("brand_id", INT8), ("name", TEXT), ("active", BOOL), ("created_at", TIMESTAMPTZ)]),
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
    "abs",
    "array_agg",
    "avg",
    "bool_and",
    "bool_or",
    "count",
    "every",
    "json_agg",
    "jsonb_agg",
    "lower",
    "max",
    "min",
    "round",
    "row_number",
    "rank",
    "stddev",
    "string_agg",
    "sum",
    "ts_rank",
    "upper",
    "generate_series",
    "unnest",
    "length",
    "percentile_cont",
    "date_part",
];
const STABLE: &[&str] = &["date_trunc", "now", "to_char", "version", "txid_current", "table_to_xml"];
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
        rules.insert("public", "brands", Placement::Reference);
        let names: Vec<Box<str>> = (1..=shards).map(|number| format!("shard{number}").into()).collect();
        let topology = Topology {
            epoch: Epoch(1),
            roster: Roster::fixed(names.len()),
            shards: names.into(),
            slots: SlotMap::new(owners).expect("every slot has an owner"),
            tables: Arc::new(rules),
            home: ShardId(0),
            moves: weir_core::topology::moves::Moves::default(),
        };
        Fixture { topology, catalog: catalog(), search_path: vec!["public".into()] }
    }

    /// One shard takes part, and a second one is joining.
    #[allow(dead_code)]
    pub fn and_one_joins(mut self) -> Self {
        self.topology.roster = Roster::new(vec![ShardState::Active, ShardState::Joining]);
        self.topology.shards = ["shard1".into(), "shard2".into()].into();
        self
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
            width: self.topology.width(),
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
                default: default_of(table, name),
            })
            .collect();
        let (kind, reads) = match *table {
            "recent" => (RelationKind::View, public(&["orders", "settings"])),
            "listing" => (RelationKind::View, public(&["categories", "products"])),
            "features" => (RelationKind::View, public(&["settings"])),
            "constants" => (RelationKind::View, Vec::new()),
            "orders_2024" => (RelationKind::OtherTable, public(&["orders"])),
            _ => (RelationKind::PlainTable, Vec::new()),
        };
        // Carts are unique by user and product; a payment's reference by itself, which is no shard key.
        let unique_columns = match *table {
            "payments" => vec![vec!["user_id".into(), "order_id".into()], vec!["provider_ref".into()]],
            "cart_items" => vec![vec!["user_id".into(), "product_id".into()]],
            _ => Vec::new(),
        };
        let triggers = if *table == "audited" { public(&["order_events"]) } else { Vec::new() };
        let relation = Relation {
            kind,
            columns,
            writes_spread: *table == "users",
            referenced: false,
            unique_columns,
            reads,
            triggers,
        };
        relations.insert((*table).into(), relation);
    }
    catalog.relations.insert("public".into(), relations);
    for (names, volatility) in
        [(IMMUTABLE, Volatility::Immutable), (STABLE, Volatility::Stable), (VOLATILE, Volatility::Volatile)]
    {
        for name in names {
            let overload = Overload { least_arguments: 0, most_arguments: 9, volatility };
            catalog.builtin_functions.insert((*name).into(), vec![overload]);
        }
    }
    let overload = |count, volatility| Overload { least_arguments: count, most_arguments: count, volatility };
    let overloads = vec![overload(1, Volatility::Stable), overload(2, Volatility::Immutable)];
    catalog.builtin_functions.insert("websearch_to_tsquery".into(), overloads);
    for (name, mentions, may_write) in [
        ("do_something", &[][..], true),
        ("order_count", &["orders"], false),
        ("product_price", &["products"], false),
        ("set_price", &["products"], true),
        ("first_of", &[], false),
    ] {
        let function = UserFunction { mentions: public(mentions), opaque: false, may_write };
        catalog.user_functions.insert(name.into(), function);
    }
    catalog.user_functions.insert("endless".into(), UserFunction { opaque: true, ..UserFunction::default() });
    catalog.aggregates.insert("first_of".into());
    catalog
}

fn public(names: &[&str]) -> Vec<RelationName> {
    names.iter().map(|name| ("public".into(), (*name).into())).collect()
}

fn default_of(table: &str, column: &str) -> DefaultKind {
    match (table, column) {
        ("brands", "brand_id" | "created_at") => DefaultKind::Differs,
        ("brands", "active") => DefaultKind::Constant,
        _ => DefaultKind::None,
    }
}
