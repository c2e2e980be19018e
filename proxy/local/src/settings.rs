//! The text of a throw-away server's `weir-local.conf`, which its `postgresql.conf` includes last.
//!
//! Fast rather than durable, but never with another meaning than a real server's: `fsync` is off, `synchronous_commit`
//! stays on. Sizes fit several clusters on a small machine. Nothing here depends on the machine.

use std::path::Path;

/// Longest path of a Unix socket on the systems we run on is 103 (macOS); the server adds `/.s.PGSQL.65535`.
const SOCKET_DIR_LEN_MAX: usize = 103 - 16;

/// `name = value` for every setting all clusters share.
const COMMON: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("max_connections", "200"),
    ("shared_buffers", "24MB"),
    ("huge_pages", "off"),
    // Files below the data directory: a killed server leaves nothing in /dev/shm.
    ("dynamic_shared_memory_type", "mmap"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "on"),
    ("wal_level", "logical"),
    ("max_prepared_transactions", "100"),
    ("max_wal_senders", "10"),
    ("max_replication_slots", "10"),
    ("wal_keep_size", "128MB"),
    ("hot_standby", "on"),
    ("wal_retrieve_retry_interval", "100ms"),
    ("wal_receiver_status_interval", "1s"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("log_line_prefix", "%m [%p] %q%u@%d "),
];

/// The whole file. `extra` comes last and wins.
pub(crate) fn text(port: u16, socket_dir: &Path, log_statements: bool, extra: &[(String, String)]) -> String {
    let mut text = String::from("# Written by weir-local at every start.\n");
    let mut line = |name: &str, value: &str| {
        text.extend([name, " = '", &value.replace('\'', "''"), "'\n"]);
    };
    for (name, value) in COMMON {
        line(name, value);
    }
    line("port", &port.to_string());
    let socket_dir = socket_dir.display().to_string();
    line("unix_socket_directories", if socket_dir.len() <= SOCKET_DIR_LEN_MAX { &socket_dir } else { "" });
    if log_statements {
        line("log_statement", "all");
    }
    for (name, value) in extra {
        line(name, value);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_settings_come_last_and_are_quoted() {
        let text = text(5432, Path::new("/x"), true, &[("application_name".to_owned(), "it's".to_owned())]);
        assert!(text.ends_with("application_name = 'it''s'\n"), "{text}");
        assert!(text.contains("\nport = '5432'\n") && text.contains("\nlog_statement = 'all'\n"), "{text}");
        assert!(text.contains("\nunix_socket_directories = '/x'\n"), "{text}");
    }

    #[test]
    fn a_long_path_gets_no_socket() {
        let text = text(5432, Path::new(&"/long".repeat(30)), false, &[]);
        assert!(text.contains("unix_socket_directories = ''"), "{text}");
        assert!(!text.contains("log_statement"), "{text}");
    }
}
