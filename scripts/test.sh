#!/usr/bin/env bash
# Runs every test of the workspace and ends with the runner's totals. The binaries must have been built before.
#
# Plain `cargo test`, also where other runners are installed: tests of one binary share its process, which lets them share
# the servers they start.
set -euo pipefail
cd "$(dirname "$0")/.."

# They wait for servers more than they compute.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 1))}
# A test that waits for ever ends the run and says what its servers have logged.
export WEIR_TEST_MINUTES=${WEIR_TEST_MINUTES:-20}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
cargo test --locked --workspace --no-fail-fast </dev/null 2>&1 | tee "$log" || status=$?

awk '
    /^test result:/ {
        binaries++
        for (field = 1; field < NF; field++) {
            if ($(field + 1) ~ /^passed/) passed += $field
            if ($(field + 1) ~ /^failed/) failed += $field
            if ($(field + 1) ~ /^ignored/) ignored += $field
        }
    }
    /^test .* \.\.\. FAILED$/ { names = names "\n  " $2 }
    END {
        printf "\ntotals: %d passed, %d failed, %d ignored in %d test binaries\n", passed, failed, ignored, binaries
        if (names != "") print "failed:" names
        if (binaries == 0) exit 1
    }
' "$log"
exit "$status"
