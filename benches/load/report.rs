//! Medians, ratios, and the tables in Markdown or JSON.

use std::fmt::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::bulk::{BulkSample, Load};
use crate::copying::CopySample;
use crate::cost::{first_line, load_average, processors};
use crate::crowd::{CrowdSample, LOGINS_PER_SECOND, SERVER_CONNECTIONS};
use crate::hits::{HitSample, Reader};
use crate::mixed::{CONNECTIONS, Care, KEYS, MixedSample};
use crate::pgbench::{Mode, TxSample};
use crate::planning::PlanSample;
use crate::prepared::PreparedSample;
use crate::replicas::OffSample;
use crate::reshard::{PauseSample, ShareSample};
use crate::shards::{Deed, SHARDS, SpreadSample};
use crate::stage::{Path, Pooler, Stage};
use crate::tpch::TpchSample;

/// What the figures depend on.
#[derive(Default)]
pub struct Machine {
    processors: String,
    date: String,
    load_before: String,
    load_after: String,
    versions: String,
    pgbouncer_prepares: bool,
}

impl Machine {
    /// `stage`: the servers that were started, if any were.
    pub fn describe(stage: Option<&Stage>, load_before: String) -> Self {
        let mut versions = format!("weir {}", env!("CARGO_PKG_VERSION"));
        if let Some(stage) = stage {
            let binaries = stage.run.binaries();
            let redis = binaries.redis_server.as_ref().map(|path| first_line(Command::new(path).arg("--version")));
            let redis = redis.and_then(|line| Some(line.split_once("v=")?.1.split(' ').next()?.to_owned()));
            let _ = write!(
                versions,
                ", PostgreSQL {}, PgBouncer {}, Redis {}",
                binaries.postgres_version,
                stage.pgbouncer.version,
                redis.unwrap_or_else(|| "?".to_owned())
            );
        }
        Machine {
            processors: processors(),
            date: first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
            load_before,
            load_after: String::new(),
            versions,
            pgbouncer_prepares: stage.is_some_and(|stage| stage.pgbouncer.has_prepared_statements()),
        }
    }

    /// To be called when all is measured.
    pub fn finish(&mut self) {
        self.load_after = load_average();
    }
}

/// Everything that was measured in one run of the program; what was not is empty.
#[derive(Default)]
pub struct Report {
    pub machine: Machine,
    pub secs: u64,
    pub rounds: u32,
    pub clients: u32,
    pub transactions: Vec<TxSample>,
    pub hits: Vec<HitSample>,
    pub mixed: Vec<MixedSample>,
    /// Servers waited for the disk in [`Self::mixed`].
    pub durable: bool,
    pub planning: Vec<PlanSample>,
    pub crowds: Vec<CrowdSample>,
    pub bulk: Vec<BulkSample>,
    pub slow: Vec<BulkSample>,
    pub prepared: Vec<PreparedSample>,
    pub spread: Vec<SpreadSample>,
    pub copies: Vec<CopySample>,
    pub tpch_scale: f64,
    pub tpch: Vec<TpchSample>,
    pub off_primary: Vec<OffSample>,
    pub pauses: Vec<PauseSample>,
    pub fourth_shard: Option<ShareSample>,
}

impl Report {
    pub fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "{}, {}, {}. Load average {} before, {} after. Medians of {} interleaved rounds of {} s.\n",
            machine.date,
            machine.processors,
            machine.versions,
            machine.load_before,
            machine.load_after,
            self.rounds,
            self.secs
        );
        self.transaction_table(&mut text);
        self.hit_table(&mut text);
        self.mixed_table(&mut text);
        self.crowd_table(&mut text);
        self.bulk_table(&mut text);
        self.slow_table(&mut text);
        self.prepared_table(&mut text);
        self.spread_table(&mut text);
        crate::copying::put_table(&self.copies, &mut text);
        self.tpch_table(&mut text);
        text.push_str(&crate::replicas::table(&self.off_primary, median));
        text.push_str(&crate::reshard::table(&self.pauses, self.fourth_shard.as_ref()));
        self.planning_table(&mut text);
        text
    }

    fn transaction_table(&self, text: &mut String) {
        if self.transactions.is_empty() {
            return;
        }
        let _ = writeln!(text, "\n`pgbench -S -c {} -j 1`, SCRAM, no TLS, cache off:\n", self.clients);
        text.push_str("| Protocol | Way | tps | ÷ direct | ÷ PgBouncer | mean ms | proxy CPU µs/tx | ÷ PgBouncer | switches/tx |\n");
        text.push_str("|---|---|--:|--:|--:|--:|--:|--:|--:|\n");
        let measured = |mode: &Mode| self.transactions.iter().any(|sample| sample.mode == *mode);
        for mode in Mode::ALL.into_iter().filter(measured) {
            for path in Path::ALL {
                self.transaction_row(text, mode, path);
            }
        }
        if !self.machine.pgbouncer_prepares {
            text.push_str("\nThis PgBouncer cannot follow protocol-level prepared statements in transaction mode (1.21 and later can): \
                           its row of that protocol is session mode, one server connection per client.\n");
        }
    }

    fn hit_table(&self, text: &mut String) {
        if self.hits.is_empty() {
            return;
        }
        text.push_str("\nOne value, read again and again, clients on the same machine:\n\n");
        text.push_str("| Bytes | Connections | From | reads/s | ÷ Redis | ÷ Postgres | p50 µs | p99 µs | server CPU µs/read | hits |\n");
        text.push_str("|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|\n");
        let mut kinds: Vec<(usize, usize)> =
            self.hits.iter().map(|sample| (sample.bytes, sample.connections)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            for reader in Reader::ALL {
                self.hit_row(text, kind, reader);
            }
        }
    }

    fn mixed_table(&self, text: &mut String) {
        if self.mixed.is_empty() {
            return;
        }
        let _ = writeln!(
            text,
            "\nReads and writes of {KEYS} rows by their key, low keys more often, {CONNECTIONS} connections, fsync {}:\n",
            if self.durable { "on" } else { "off" },
        );
        text.push_str("| Writes | weir | statements/s | ÷ pass-through | CPU µs/statement, weir | weir and server | ÷ pass-through | hits |\n");
        text.push_str("|--:|---|--:|--:|--:|--:|--:|--:|\n");
        let mut mixes: Vec<u32> = self.mixed.iter().map(|sample| sample.write_percent).collect();
        mixes.sort_unstable();
        mixes.dedup();
        for percent in mixes {
            let of = |care: Care, figure: fn(&MixedSample) -> f64| {
                let samples = self.mixed.iter().filter(|sample| sample.care == care && sample.write_percent == percent);
                median(samples.map(figure).collect())
            };
            for care in Care::ALL.into_iter().filter(|care| of(*care, |sample| sample.statements).is_some()) {
                let figure = |figure| of(care, figure).unwrap_or_default();
                let (name, statements) = (care.name(), figure(|sample| sample.statements));
                let all = figure(|sample| sample.all_us);
                let _ = writeln!(
                    text,
                    "| {percent} % | {name} | {statements:.0} | {} | {:.1} | {all:.1} | {} | {:.1} % |",
                    ratio(statements, of(Care::PassThrough, |sample| sample.statements)),
                    figure(|sample| sample.proxy_us),
                    ratio(all, of(Care::PassThrough, |sample| sample.all_us)),
                    figure(|sample| sample.hit_ratio) * 100.0,
                );
            }
        }
    }

    fn crowd_table(&self, text: &mut String) {
        let Some(first) = self.crowds.first() else { return };
        let _ = writeln!(
            text,
            "\n{} clients, {LOGINS_PER_SECOND} begin to log in per second (SCRAM), then each asks once at the same time; \
             {SERVER_CONNECTIONS} server connections:\n",
            first.clients
        );
        text.push_str("| Way | log-ins/s | p50 ms | p99 ms | CPU µs/log-in | refused | KiB/client connected | KiB/client idle after a query | ÷ PgBouncer | all asked, ms | unanswered |\n");
        text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
        let base =
            self.crowds.iter().find(|sample| sample.pooler == Pooler::PgBouncer).map(|sample| sample.asked_bytes);
        for sample in &self.crowds {
            let _ = writeln!(
                text,
                "| {} | {:.0} | {:.1} | {:.1} | {:.0} | {} | {:.2} | {:.2} | {} | {:.0} | {} |",
                sample.pooler.name(),
                sample.logins_per_second,
                sample.login_p50_ms,
                sample.login_p99_ms,
                sample.login_cpu_us,
                sample.refused,
                sample.connected_bytes / 1024.0,
                sample.asked_bytes / 1024.0,
                ratio(sample.asked_bytes, base),
                sample.asked_ms,
                sample.unanswered
            );
        }
    }

    fn bulk_table(&self, text: &mut String) {
        if self.bulk.is_empty() {
            return;
        }
        text.push_str("\nLarge results, one client:\n\n");
        text.push_str("| Result | Way | MB | MB/s | ÷ direct | proxy CPU s/GB | memory before, MB | at most, MB |\n");
        text.push_str("|---|---|--:|--:|--:|--:|--:|--:|\n");
        for load in Load::ALL {
            let of = |path: Path, figure: fn(&BulkSample) -> f64| {
                let samples = self.bulk.iter().filter(|sample| sample.load == load && sample.path == path);
                median(samples.map(figure).collect())
            };
            for path in Path::ALL {
                let Some(speed) = of(path, BulkSample::megabytes_per_second) else { continue };
                let figure = |figure| of(path, figure).unwrap_or_default();
                let memory =
                    |bytes: f64| if path == Path::Direct { "–".to_owned() } else { format!("{:.1}", bytes / 1e6) };
                let _ = writeln!(
                    text,
                    "| {} | {} | {:.0} | {speed:.0} | {} | {:.2} | {} | {} |",
                    load.name(),
                    path.name(),
                    figure(|sample| sample.bytes as f64 / 1e6),
                    ratio(speed, of(Path::Direct, BulkSample::megabytes_per_second)),
                    figure(|sample| sample.proxy_seconds * 1e9 / sample.bytes as f64),
                    memory(figure(|sample| sample.before_bytes as f64)),
                    memory(figure(|sample| sample.max_bytes as f64)),
                );
            }
        }
    }

    fn slow_table(&self, text: &mut String) {
        if self.slow.is_empty() {
            return;
        }
        text.push_str("\nA reader who takes 1 MB/s of a COPY of 1 GB:\n\n");
        text.push_str("| Way | read, MB | memory before, MB | at most, MB |\n|---|--:|--:|--:|\n");
        for sample in &self.slow {
            let (read, before, most) =
                (sample.bytes as f64 / 1e6, sample.before_bytes as f64 / 1e6, sample.max_bytes as f64 / 1e6);
            let _ = writeln!(text, "| {} | {read:.1} | {before:.1} | {most:.1} |", sample.path.name());
        }
    }

    fn prepared_table(&self, text: &mut String) {
        let Some(first) = self.prepared.first() else { return };
        let _ = writeln!(
            text,
            "\n{} different texts, each prepared, executed and closed once, 100 to a pipeline:\n",
            first.texts
        );
        text.push_str(
            "| Way | statements/s | ÷ direct | memory with full caches, MB | at most, MB |\n|---|--:|--:|--:|--:|\n",
        );
        let direct = self.prepared.iter().find(|sample| sample.path == Path::Direct).map(|sample| sample.per_second);
        for sample in &self.prepared {
            let memory = |bytes: u64| {
                if sample.path == Path::Direct { "–".to_owned() } else { format!("{:.1}", bytes as f64 / 1e6) }
            };
            let _ = writeln!(
                text,
                "| {} | {:.0} | {} | {} | {} |",
                sample.path.name(),
                sample.per_second,
                ratio(sample.per_second, direct),
                memory(sample.full_bytes),
                memory(sample.max_bytes)
            );
        }
    }

    fn spread_table(&self, text: &mut String) {
        let Some(first) = self.spread.first() else { return };
        let _ = writeln!(text, "\n{} rows on one Postgres and on N shards through weir, one client:\n", first.rows);
        text.push_str(
            "| What | Where | ms | rows/s | ÷ one Postgres, rows/s | weir CPU µs/row |\n|---|---|--:|--:|--:|--:|\n",
        );
        for deed in Deed::ALL {
            let of = |shards: Option<u32>, figure: fn(&SpreadSample) -> f64| {
                let samples = self.spread.iter().filter(|sample| sample.deed == deed && sample.shards == shards);
                median(samples.map(figure).collect()).unwrap_or_default()
            };
            for shards in std::iter::once(None).chain(SHARDS.map(Some)) {
                let (seconds, rows) = (of(shards, |sample| sample.seconds), first.rows as f64);
                let place = shards.map_or("one Postgres".to_owned(), |shards| format!("{shards} shards"));
                let cpu = shards.map_or("–".to_owned(), |_| {
                    format!("{:.2}", of(shards, |sample| sample.proxy_seconds) * 1e6 / rows)
                });
                let _ = writeln!(
                    text,
                    "| {} | {place} | {:.1} | {:.0} | {} | {cpu} |",
                    deed.name(),
                    seconds * 1e3,
                    rows / seconds,
                    ratio(1.0 / seconds, Some(1.0 / of(None, |sample| sample.seconds))),
                );
            }
        }
    }

    fn tpch_table(&self, text: &mut String) {
        if self.tpch.is_empty() {
            return;
        }
        let _ = writeln!(text, "\nTPC-H, scale {}, two shards, best of {} rounds:\n", self.tpch_scale, self.rounds);
        text.push_str("| Query | Answered by | ms | one Postgres, ms | ÷ | rows moved |\n|--:|---|--:|--:|--:|--:|\n");
        for sample in &self.tpch {
            let (weir, one) = (sample.weir_ms, sample.one_ms);
            let times = ratio(weir, Some(one));
            let (query, how, moved) = (sample.query, &sample.how, sample.rows_moved);
            let _ = writeln!(text, "| {query} | {how} | {weir:.1} | {one:.1} | {times} | {moved} |");
        }
        let logs: f64 = self.tpch.iter().map(|sample| (sample.weir_ms / sample.one_ms).ln()).sum();
        let _ = writeln!(text, "\nGeometric mean: {:.2} times one Postgres.", (logs / self.tpch.len() as f64).exp());
    }

    fn planning_table(&self, text: &mut String) {
        if self.planning.is_empty() {
            return;
        }
        text.push_str("\nFrom text to bound plan, processor time of one thread, no server:\n\n");
        text.push_str("| Statement | bytes | sight | µs, one server | µs, two shards | of which cutting into tokens | sqlparser alone |\n|---|--:|---|--:|--:|--:|--:|\n");
        for sample in &self.planning {
            let (name, sight) = (sample.text, sample.sight.name());
            let _ = writeln!(
                text,
                "| {name} | {} | {sight} | {:.2} | {:.2} | {:.2} | {} |",
                sample.bytes,
                sample.alone_us,
                sample.sharded_us,
                sample.lex_us,
                sample.parser_us.map_or("–".to_owned(), |us| format!("{us:.2}"))
            );
        }
    }

    fn transaction_row(&self, text: &mut String, mode: Mode, path: Path) {
        let (name, way) = (mode.name(), path.name());
        let Some(tps) = self.transaction(mode, path, |sample| sample.tps) else {
            let _ = writeln!(text, "| {name} | {way} | – | – | – | – | – | – | – |");
            return;
        };
        let tps_of = |path| self.transaction(mode, path, |sample| sample.tps);
        let cpu_of = |path| self.transaction(mode, path, |sample| sample.proxy_us);
        let latency = self.transaction(mode, path, |sample| sample.latency_ms).unwrap_or_default();
        let _ = write!(text, "| {name} | {way} | {tps:.0} | {} ", ratio(tps, tps_of(Path::Direct)));
        let _ = write!(text, "| {} | {latency:.2} ", ratio(tps, tps_of(Path::PgBouncer)));
        if path == Path::Direct {
            text.push_str("| – | – | – |\n");
            return;
        }
        let cpu = cpu_of(path).unwrap_or_default();
        let switches = self.transaction(mode, path, |sample| sample.proxy_switches).unwrap_or_default();
        let _ = writeln!(text, "| {cpu:.1} | {} | {switches:.2} |", ratio(cpu, cpu_of(Path::PgBouncer)));
    }

    fn hit_row(&self, text: &mut String, (bytes, connections): (usize, usize), reader: Reader) {
        let of = |reader: Reader, figure: fn(&HitSample) -> f64| {
            let alike = |sample: &&HitSample| sample.connections == connections && sample.bytes == bytes;
            let samples = self.hits.iter().filter(alike).filter(|sample| sample.reader == reader);
            median(samples.map(figure).collect())
        };
        let Some(reads) = of(reader, |sample| sample.reads) else { return };
        let figure = |figure| of(reader, figure).unwrap_or_default();
        let hits = match reader {
            Reader::WeirCache => format!("{:.1} %", figure(|sample| sample.hit_ratio.unwrap_or(0.0)) * 100.0),
            Reader::RedisGet | Reader::Postgres => "–".to_owned(),
        };
        let _ = writeln!(
            text,
            "| {bytes} | {connections} | {} | {reads:.0} | {} | {} | {:.0} | {:.0} | {:.1} | {hits} |",
            reader.name(),
            ratio(reads, of(Reader::RedisGet, |sample| sample.reads)),
            ratio(reads, of(Reader::Postgres, |sample| sample.reads)),
            figure(|sample| sample.p50_us),
            figure(|sample| sample.p99_us),
            figure(|sample| sample.server_us),
        );
    }

    /// Median of one figure over the rounds.
    fn transaction(&self, mode: Mode, path: Path, figure: fn(&TxSample) -> f64) -> Option<f64> {
        let samples = self.transactions.iter().filter(|sample| sample.mode == mode && sample.path == path);
        median(samples.map(figure).collect())
    }

    /// Every sample, so that others can make their own medians.
    pub fn json(&self) -> Value {
        let transactions: Vec<Value> = self.transactions.iter().map(|sample| {
            json!({
                "protocol": sample.mode.name(), "way": sample.path.name(), "tps": sample.tps, "latency_ms": sample.latency_ms,
                "proxy_cpu_us": sample.proxy_us, "proxy_switches": sample.proxy_switches,
            })
        }).collect();
        let crowds: Vec<Value> = self.crowds.iter().map(|sample| {
            json!({
                "way": sample.pooler.name(), "clients": sample.clients, "logins_per_second": sample.logins_per_second,
                "login_p50_ms": sample.login_p50_ms, "login_p99_ms": sample.login_p99_ms, "login_cpu_us": sample.login_cpu_us,
                "refused": sample.refused, "connected_bytes": sample.connected_bytes, "idle_bytes": sample.asked_bytes,
                "asked_ms": sample.asked_ms, "unanswered": sample.unanswered,
            })
        }).collect();
        let bulk = |samples: &[BulkSample]| -> Vec<Value> {
            samples.iter().map(|sample| {
                json!({
                    "result": sample.load.name(), "way": sample.path.name(), "bytes": sample.bytes, "seconds": sample.seconds,
                    "proxy_cpu_seconds": sample.proxy_seconds, "before_bytes": sample.before_bytes, "max_bytes": sample.max_bytes,
                })
            }).collect()
        };
        let prepared: Vec<Value> = self
            .prepared
            .iter()
            .map(|sample| {
                json!({
                    "way": sample.path.name(), "texts": sample.texts, "per_second": sample.per_second,
                    "full_bytes": sample.full_bytes, "max_bytes": sample.max_bytes,
                })
            })
            .collect();
        let planning: Vec<Value> = self.planning.iter().map(|sample| {
            json!({
                "text": sample.text, "bytes": sample.bytes, "sight": sample.sight.name(), "one_server_us": sample.alone_us,
                "two_shards_us": sample.sharded_us, "lex_us": sample.lex_us, "parser_us": sample.parser_us,
            })
        }).collect();
        let hits: Vec<Value> = self.hits.iter().map(|sample| {
            json!({
                "from": sample.reader.name(), "connections": sample.connections, "bytes": sample.bytes, "reads_per_second": sample.reads,
                "p50_us": sample.p50_us, "p99_us": sample.p99_us, "server_cpu_us": sample.server_us, "hit_ratio": sample.hit_ratio,
            })
        }).collect();
        json!({
            "date": self.machine.date, "processors": self.machine.processors, "versions": self.machine.versions,
            "load_before": self.machine.load_before, "load_after": self.machine.load_after,
            "secs": self.secs, "rounds": self.rounds, "clients": self.clients,
            "transactions": transactions, "reads": hits, "mixed": self.mixed_json(), "crowds": crowds, "bulk": bulk(&self.bulk),
            "slow_readers": bulk(&self.slow), "prepared": prepared, "planning": planning, "shards": self.spread_json(),
            "reshard_copy": crate::copying::json(&self.copies),
            "tpch_scale": self.tpch_scale, "tpch": self.tpch_json(),
            "off_primary": crate::replicas::to_json(&self.off_primary),
            "resharding": crate::reshard::to_json(&self.pauses, self.fourth_shard.as_ref()),
        })
    }

    fn mixed_json(&self) -> Vec<Value> {
        let one = |sample: &MixedSample| {
            json!({
                "weir": sample.care.name(), "write_percent": sample.write_percent, "durable": self.durable, "statements_per_second": sample.statements,
                "proxy_cpu_us": sample.proxy_us, "proxy_and_server_cpu_us": sample.all_us, "hit_ratio": sample.hit_ratio,
            })
        };
        self.mixed.iter().map(one).collect()
    }

    fn spread_json(&self) -> Vec<Value> {
        self.spread
            .iter()
            .map(|sample| {
                json!({
                    "what": sample.deed.name(), "shards": sample.shards, "rows": sample.rows, "seconds": sample.seconds,
                    "proxy_cpu_seconds": sample.proxy_seconds,
                })
            })
            .collect()
    }

    fn tpch_json(&self) -> Vec<Value> {
        self.tpch
            .iter()
            .map(|sample| {
                json!({
                    "query": sample.query, "how": sample.how, "ms": sample.weir_ms, "one_postgres_ms": sample.one_ms,
                    "rows_moved": sample.rows_moved,
                })
            })
            .collect()
    }
}

/// None of nothing; of an even number, the mean of the middle two.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

fn ratio(value: f64, of: Option<f64>) -> String {
    match of {
        Some(of) if of > 0.0 => format!("{:.2}", value / of),
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(ratio(1.0, Some(2.0)), "0.50");
        assert_eq!(ratio(1.0, Some(0.0)), "–");
        assert_eq!(ratio(1.0, None), "–");
    }
}
