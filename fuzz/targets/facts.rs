//! Lexer, classes, Facts and plans on any text: no panic, tokens that tile the text, and the same verdict twice.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::plan::{Schema, Values, compile};
use weir_core::session::effect::session_effects;
use weir_core::sql::class::classify;
use weir_core::sql::lex::lex;
use weir_core::sql::normal::{Normal, normalize, split_statements};
use weir_core::topology::catalog::Catalog;
use weir_core::topology::{KeyType, Placement, SlotMap, TableRules, Topology};

/// Longer texts are the parser's time, not its variety.
const TEXT_BYTES_MAX: usize = 4 * 1024;

fuzz_target!(|input: &[u8]| {
    let Ok(sql) = std::str::from_utf8(input) else { return };
    if sql.len() > TEXT_BYTES_MAX {
        return;
    }
    let mut tokens = Vec::new();
    if lex(sql, &mut tokens).is_err() {
        return;
    }
    let mut end = 0;
    for token in &tokens {
        assert!(token.start >= end && token.end > token.start, "tokens overlap in {sql:?}");
        end = token.end;
        let _ = token.text(sql);
    }
    for part in split_statements(sql, &tokens) {
        assert!(part.start < part.end && part.end <= tokens.len());
    }
    let class = classify(sql, &tokens);
    let _ = session_effects(sql, &tokens);
    let mut normal = Normal::default();
    normalize(sql, &tokens, &mut normal);
    let rules = rules();
    let path = [Box::<str>::from("public")];
    let schema = Schema { rules: &rules, catalog: &Catalog::default(), search_path: &path, width: weir_core::topology::Width::Several };
    let compiled = compile(&normal, &class, sql, &schema);
    let topology = topology();
    let values = Values { params: &[], sql, literals: &normal.literals };
    let first = compiled.template.bind(&values, &topology).map(|plan| format!("{plan:?}"));
    let second = compiled.template.bind(&values, &topology).map(|plan| format!("{plan:?}"));
    assert_eq!(first, second);
});

fn topology() -> Topology {
    let owners = (0..Slot::COUNT).map(|slot| ShardId((slot % 2) as u16)).collect();
    Topology {
        epoch: Epoch(1),
        shards: ["shard0".into(), "shard1".into()].into(),
        slots: SlotMap::new(owners).expect("an owner per slot"),
        tables: Arc::new(rules()),
        home: ShardId(0),
        moves: weir_core::topology::moves::Moves::default(),
    }
}

fn rules() -> TableRules {
    let mut rules = TableRules::default();
    let sharded = |key: &str, key_type| Placement::Sharded { key: key.into(), key_type };
    rules.insert("public", "orders", sharded("user_id", KeyType::Int));
    rules.insert("public", "users", sharded("user_id", KeyType::Int));
    rules.insert("public", "emails", sharded("email", KeyType::Text));
    rules.insert("public", "products", Placement::Reference);
    rules
}
