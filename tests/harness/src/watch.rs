//! An end to tests that would wait for ever: what their servers have logged, and a process that ends.
//!
//! Invariant: a run of all tests ends, and says which one did not. Non-goals: stopping the test alone. A thread cannot be
//! stopped from outside, and what it holds would keep the others waiting.

use std::io::Write as _;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use weir_local::{Run, log_tail};

/// Environment variable: how many minutes a test may have its servers; for ever if it is not set.
const LIMIT: &str = "WEIR_TEST_MINUTES";

/// Ends the process if it lives longer than tests may. Kept for as long as a test has its servers.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Closed when the test is done.
    _watched: Option<Sender<()>>,
}

impl Watch {
    /// Of the test on whose thread this is called.
    pub(crate) fn over(run: &Run) -> Self {
        let Some(minutes) = std::env::var(LIMIT).ok().and_then(|minutes| minutes.parse::<u64>().ok()) else {
            return Self { _watched: None };
        };
        let (watched, done) = channel::<()>();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let logs = run.path().join("log");
        std::thread::spawn(move || {
            if done.recv_timeout(Duration::from_secs(60 * minutes)) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            // Straight to the terminal: the runner keeps to itself what tests print.
            let mut said = std::io::stderr().lock();
            let _ =
                writeln!(said, "\n{test} has had its servers for {minutes} minutes ({LIMIT}): its runner ends here");
            for log in std::fs::read_dir(&logs).into_iter().flatten().flatten() {
                let _ = writeln!(said, "{} ends with:\n{}", log.file_name().to_string_lossy(), log_tail(&log.path()));
            }
            // Titles of servers' processes say what they are at.
            if let Ok(all) = Command::new("ps").args(["-eo", "pid,ppid,etime,stat,args"]).output() {
                let all = String::from_utf8_lossy(&all.stdout);
                for line in all.lines().filter(|line| line.contains("postgres:")) {
                    let _ = writeln!(said, "{line}");
                }
            }
            std::process::abort();
        });
        Self { _watched: Some(watched) }
    }
}
