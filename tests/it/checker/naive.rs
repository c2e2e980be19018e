//! Would the checker notice? A weir built with the feature `unsound` is broken at one step after the other, and each time the checker
//! has to find it; unbroken, but dying and lingering between its steps, it has to be found right.
//!
//! That takes minutes and a build of its own: `make checker`, which names that weir in WEIR_CHECKER_UNSOUND. Without it the only
//! question is whether the weir under test is one that cannot be broken so. (The models of weir-core catch their own mutants.)

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::disturbance::Disturbance::{self, *};
use super::{Report, Settings, number, run};

/// A variable that only an unsound build knows.
const HOOK: &[u8] = b"WEIR_UNSOUND";
/// A variant that is not caught for so long is not caught.
const LONGEST: Duration = Duration::from_secs(120);
/// Percent of statements.
const WRITES: u64 = 30;
/// The run without a variant.
const SOUND: u64 = 20_000;

/// How one step is left out, and what gives it its chance besides reads and writes.
struct Variant {
    name: &'static str,
    disturbances: &'static [Disturbance],
    /// Replicas of each shard. Some variants are wrong with answers of primaries: a replica's are looked at twice, and may show what
    /// the primary does not show yet.
    replicas: u32,
    /// Where it lingers, and for how long at most; otherwise everywhere.
    linger: Option<&'static str>,
    /// Are writes beside weir decoded? Decoding moves words once more, which mends some of what is wrong.
    decoding: bool,
    /// Percent of statements. Words that are written too often are not filled.
    writes: u64,
    /// About how long a disturbance lasts.
    moment: Duration,
}

/// Other disturbances than those of dead proxies, whose absence the others must notice first.
const MOMENT: Duration = Duration::from_secs(1);
const MOMENT_OF_THE_DEAD: Duration = Duration::from_secs(6);

const fn variant(name: &'static str, disturbances: &'static [Disturbance]) -> Variant {
    Variant { name, disturbances, replicas: 1, linger: None, decoding: true, writes: WRITES, moment: MOMENT }
}

const VARIANTS: [Variant; 13] = [
    variant("intent_after_write", &[]),
    variant("no_pending", &[]),
    variant("no_second_look", &[StandbyStalled]),
    variant("replica_unasked", &[ReplayPaused]),
    Variant { replicas: 0, linger: Some("replied:400"), decoding: false, writes: 10, ..variant("stamp_after", &[]) },
    variant("early_lsn", &[ReplayPaused]),
    Variant { decoding: false, moment: MOMENT_OF_THE_DEAD, ..variant("intent_time_out", &[WritesOrphaned]) },
    Variant { replicas: 0, ..variant("join_by_key", &[]) },
    variant("no_peers", &[]),
    variant("no_lease", &[ProxyStopped]),
    Variant { replicas: 0, ..variant("ungated_decoding", &[StandbyStalled]) },
    variant("redis_judges", &[ProxyKilled]),
    Variant { decoding: false, ..variant("no_floor", &[CommitsLostQuietly]) },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn naive_variants_are_caught_and_are_not_in_the_weir_under_test() -> Result<()> {
    let Some(unsound) = std::env::var_os("WEIR_CHECKER_UNSOUND") else {
        ensure!(!knows_hooks(&weir_harness::weir_binary()?)?, "this weir was built with the feature unsound");
        return Ok(());
    };
    let unsound = Path::new(&unsound);
    ensure!(knows_hooks(unsound)?, "{} was not built with the feature unsound", unsound.display());
    let mut table = vec![
        "| Variant | Disturbed by | Found | Reads until then | Seconds |".to_owned(),
        "|---|---|---|---|---|".to_owned(),
    ];
    let mut wrong = Vec::new();
    let only = std::env::var("WEIR_CHECKER_VARIANT").ok();
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    if wanted("none") {
        let report = run(sound(unsound)?).await?;
        wrong.extend(report.found.as_ref().map(|found| format!("unbroken, and yet: {found:?}")));
        table.push(row("none; dying and lingering between steps", "everything", &report));
    }
    for variant in VARIANTS.iter().filter(|variant| wanted(variant.name)) {
        let name = variant.name;
        eprintln!("checker: {name}");
        let report = run(broken(unsound, variant)?).await?;
        if report.found.is_none() {
            wrong.push(format!("{name} was not caught"));
        }
        let by = variant.disturbances.iter().map(|one| format!("{one:?}")).collect::<Vec<_>>().join(", ");
        table.push(row(name, if by.is_empty() { "nothing" } else { &by }, &report));
        eprintln!("{}", table.last().map_or("", String::as_str));
    }
    eprintln!("\n{}\n", table.join("\n"));
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

fn knows_hooks(binary: &Path) -> Result<bool> {
    Ok(std::fs::read(binary)?.windows(HOOK.len()).any(|part| part == HOOK))
}

fn row(name: &str, by: &str, report: &Report) -> String {
    let (what, reads, after) = match &report.found {
        Some(found) => (found.what, found.reads, found.after),
        None => ("nothing", report.reads, report.elapsed),
    };
    format!("| {name} | {by} | {what} | {reads} | {:.0} |", after.as_secs_f64())
}

fn sound(unsound: &Path) -> Result<Settings> {
    let mut settings = lingering(unsound)?;
    settings.reads = number("WEIR_CHECKER_READS").unwrap_or(SOUND);
    settings.disturbances = Disturbance::ALL.to_vec();
    // As often as all others together.
    settings.disturbances.extend([ProxyDiesOnItsWay; Disturbance::ALL.len()]);
    Ok(settings)
}

fn broken(unsound: &Path, variant: &Variant) -> Result<Settings> {
    let mut settings = lingering(unsound)?;
    settings.reads = u64::MAX;
    settings.longest = Some(LONGEST);
    settings.disturbances = variant.disturbances.to_vec();
    settings.rest_every = 1;
    settings.calm = Duration::from_secs(3);
    settings.writes = Some(variant.writes);
    settings.replicas = variant.replicas;
    settings.registers = 40;
    settings.moment = variant.moment;
    settings.beside_max = Some(Duration::from_secs(10));
    settings.environment.push(("WEIR_UNSOUND".to_owned(), variant.name.to_owned()));
    if let Some(linger) = variant.linger {
        settings.environment.push(("WEIR_LINGER".to_owned(), linger.to_owned()));
    }
    if !variant.decoding {
        settings.beside = false;
        settings.config.push_str("\ndecoding = \"off\"");
    }
    Ok(settings)
}

fn lingering(unsound: &Path) -> Result<Settings> {
    let mut settings = Settings::asked_for()?;
    settings.writers = 4;
    settings.weir = Some(unsound.to_owned());
    settings.environment.push(("WEIR_LINGER".to_owned(), "anywhere:50".to_owned()));
    settings.moment = MOMENT;
    Ok(settings)
}
