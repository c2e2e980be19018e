//! EXPLAIN over shards: what weir does, then each shard's plan, in one answer.

use anyhow::Result;
use weir_harness::Tier;
use weir_wire::backend::tag;
use weir_wire::frontend::{Bind, Execute, Object, Parse, Target, put_query, put_sync};

use crate::placement::{column, create_schema};
use crate::raw::Raw;

#[tokio::test(flavor = "multi_thread")]
async fn explain_tells_of_weir_and_of_every_shard() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 1..=20_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'x')", &[&key]).await?;
    }
    let merged =
        column(&client, "EXPLAIN (COSTS off) SELECT name FROM users WHERE name > 'a' ORDER BY user_id LIMIT 3").await?;
    let text = merged.join("\n");
    for part in ["Weir", "target: all shards", "merge: order by", "limit 3", "Shard "] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    assert_eq!(merged.iter().filter(|line| line.starts_with("Shard ")).count(), 2, "{text}");
    assert_eq!(text.matches("Limit").count(), 2, "each shard's own plan: {text}");
    let keyed = column(&client, "EXPLAIN SELECT name FROM users WHERE user_id = 7").await?.join("\n");
    assert!(keyed.contains("target: one shard") && keyed.contains("slots: ") && keyed.contains("Index"), "{keyed}");
    assert_eq!(keyed.matches("Shard ").count(), 1, "{keyed}");
    // ANALYZE runs a read, and only a read.
    let analyzed = column(&client, "EXPLAIN ANALYZE SELECT count(*) FROM users").await?.join("\n");
    assert_eq!(analyzed.matches("actual time").count() % 2, 0, "{analyzed}");
    assert!(analyzed.contains("merge: group by"), "{analyzed}");
    let update = column(&client, "EXPLAIN UPDATE users SET name = 'y'").await?.join("\n");
    assert_eq!(update.matches("Update on users").count(), 2, "{update}");
    {
        let refused = "EXPLAIN ANALYZE UPDATE users SET name = 'y'";
        let error = client.simple_query(refused).await.expect_err(refused);
        let error = error.as_db_error().expect("an answer");
        assert_eq!(error.code().code(), "0A000", "{refused}");
        assert!(error.detail().is_some() && error.hint().is_some(), "{refused}");
    }
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE name = 'y'").await?, ["0"]);
    let json = column(&client, "EXPLAIN (FORMAT json) SELECT name FROM users").await?;
    let parsed: serde_json::Value = serde_json::from_str(&json[0])?;
    assert_eq!(parsed[0]["Weir"]["target"], "all shards");
    assert_eq!(parsed[0]["Shards"].as_array().map(Vec::len), Some(2));
    assert_eq!(parsed[0]["Shards"][1]["Explain"][0]["Plan"]["Node Type"], "Seq Scan");
    let yaml = column(&client, "EXPLAIN (FORMAT yaml, COSTS off) SELECT name FROM users").await?;
    let plans = "\n      Explain: \n        - Plan: \n            Node Type: \"Seq Scan\"";
    assert!(yaml.len() == 1 && yaml[0].starts_with("- Weir: \n    target: \"all shards\""), "{yaml:?}");
    assert_eq!(yaml[0].matches(plans).count(), 2, "{}", yaml[0]);
    let xml = column(&client, "EXPLAIN (FORMAT xml) SELECT name FROM users WHERE name < 'b'").await?;
    let read = format!(
        "SELECT (xpath('//w:Weir/w:target/text()', x, n))[1], cardinality(xpath('/w:explain/w:Shard/w:explain//w:Plan', x, n)) \
         FROM (SELECT xmlparse(DOCUMENT '{}') AS x, ARRAY[ARRAY['w', 'http://www.postgresql.org/2009/explain']] AS n) d",
        xml[0].replace('\'', "''")
    );
    let row = client.query_one(&read.replace("))[1]", "))[1]::text"), &[]).await?;
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i32>(1)), ("all shards", 2), "{}", xml[0]);
    described(&tier).await
}

/// One column "QUERY PLAN", in both protocols.
async fn described(tier: &Tier) -> Result<()> {
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    let sql = "EXPLAIN SELECT name FROM users";
    put_query(&mut raw.out, sql);
    let (tags, simple) = raw.until_ready().await?;
    assert!(tags.starts_with("TDD") && tags.ends_with("DCZ"), "{tags}");
    Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut raw.out);
    Bind::read(b"\0\0\0\0\0\0\0\0")?.put_for(b"", &mut raw.out);
    Target { object: Object::Portal, name: b"" }.put(b'D', &mut raw.out);
    Execute { portal: b"", rows_max: 0 }.put(&mut raw.out);
    put_sync(&mut raw.out);
    let (tags, extended) = raw.until_ready().await?;
    assert!(tags.starts_with("12TDD"), "{tags}");
    assert_eq!(simple[0], extended[2]);
    let fields = weir_wire::row::fields(&simple[0])?;
    assert_eq!((fields.len(), fields[0].name), (1, &b"QUERY PLAN"[..]));
    assert_eq!(simple.len() + 2, extended.len(), "the same rows");
    assert_eq!(tags.bytes().rev().nth(1), Some(tag::COMMAND_COMPLETE));
    Ok(())
}
