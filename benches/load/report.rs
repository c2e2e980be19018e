//! Medians, ratios, and the tables in Markdown or JSON.

use std::fmt::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::cost::{first_line, load_average, processors};
use crate::hits::{HitSample, Reader};
use crate::pgbench::{Mode, TxSample};
use crate::stage::{Path, Stage, VALUE_BYTES};

/// What the figures depend on.
pub struct Machine {
    processors: String,
    date: String,
    load_before: String,
    load_after: String,
    versions: String,
    pgbouncer_prepares: bool,
}

impl Machine {
    pub fn describe(stage: &Stage, load_before: String) -> Self {
        let binaries = stage.run.binaries();
        let redis = binaries.redis_server.as_ref().map(|path| first_line(Command::new(path).arg("--version")));
        let redis = redis.and_then(|line| Some(line.split_once("v=")?.1.split(' ').next()?.to_owned()));
        let versions = format!(
            "weir {}, PostgreSQL {}, PgBouncer {}, Redis {}",
            env!("CARGO_PKG_VERSION"),
            binaries.postgres_version,
            stage.pgbouncer.version,
            redis.unwrap_or_else(|| "?".to_owned())
        );
        Machine {
            processors: processors(),
            date: first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
            load_before,
            load_after: load_average(),
            versions,
            pgbouncer_prepares: stage.pgbouncer.has_prepared_statements(),
        }
    }
}

/// Everything that was measured in one run of the program.
pub struct Report {
    pub machine: Machine,
    pub secs: u64,
    pub rounds: u32,
    pub clients: u32,
    pub transactions: Vec<TxSample>,
    pub hits: Vec<HitSample>,
}

impl Report {
    pub fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "{}, {}, {}. Load average {} before, {} after. Medians of {} interleaved rounds of {} s.\n\n",
            machine.date,
            machine.processors,
            machine.versions,
            machine.load_before,
            machine.load_after,
            self.rounds,
            self.secs
        );
        let _ = writeln!(text, "`pgbench -S -c {} -j 1`, SCRAM, no TLS, cache off:\n", self.clients);
        text.push_str("| Protocol | Way | tps | ÷ direct | ÷ PgBouncer | mean ms | proxy CPU µs/tx | ÷ PgBouncer | switches/tx |\n");
        text.push_str("|---|---|--:|--:|--:|--:|--:|--:|--:|\n");
        let measured = |mode: &Mode| self.transactions.iter().any(|sample| sample.mode == *mode);
        for mode in Mode::ALL.into_iter().filter(measured) {
            for path in Path::ALL {
                self.transaction_row(&mut text, mode, path);
            }
        }
        if !machine.pgbouncer_prepares {
            text.push_str("\nThis PgBouncer cannot follow protocol-level prepared statements in transaction mode (1.21 and later can).\n");
        }
        let _ =
            writeln!(text, "\nOne value of {VALUE_BYTES} bytes, read again and again, clients on the same machine:\n");
        text.push_str("| Connections | From | reads/s | ÷ Redis | p50 µs | p99 µs | server CPU µs/read | hits |\n");
        text.push_str("|--:|---|--:|--:|--:|--:|--:|--:|\n");
        let mut connections: Vec<usize> = self.hits.iter().map(|sample| sample.connections).collect();
        connections.sort_unstable();
        connections.dedup();
        for connections in connections {
            for reader in Reader::ALL {
                self.hit_row(&mut text, connections, reader);
            }
        }
        text
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

    fn hit_row(&self, text: &mut String, connections: usize, reader: Reader) {
        let of = |reader: Reader, figure: fn(&HitSample) -> f64| {
            let samples =
                self.hits.iter().filter(|sample| sample.connections == connections && sample.reader == reader);
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
            "| {connections} | {} | {reads:.0} | {} | {:.0} | {:.0} | {:.1} | {hits} |",
            reader.name(),
            ratio(reads, of(Reader::RedisGet, |sample| sample.reads)),
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
        let hits: Vec<Value> = self.hits.iter().map(|sample| {
            json!({
                "from": sample.reader.name(), "connections": sample.connections, "reads_per_second": sample.reads,
                "p50_us": sample.p50_us, "p99_us": sample.p99_us, "server_cpu_us": sample.server_us, "hit_ratio": sample.hit_ratio,
            })
        }).collect();
        json!({
            "date": self.machine.date, "processors": self.machine.processors, "versions": self.machine.versions,
            "load_before": self.machine.load_before, "load_after": self.machine.load_after,
            "secs": self.secs, "rounds": self.rounds, "clients": self.clients,
            "transactions": transactions, "reads": hits,
        })
    }
}

/// None of nothing; of an even number, the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
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
