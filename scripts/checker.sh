#!/usr/bin/env bash
# The freshness checker at length: a weir that can be broken on purpose, the table of what was caught, then reads and disturbances.
# Ends with an error if a broken weir was not caught, or the weir under test was. Takes about a quarter of an hour on two cores that
# do nothing else. With --release the weir that is not broken is an optimised one, which answers several times as many reads a second:
# for long runs. WEIR_CHECKER_READS, WEIR_CHECKER_SEED, WEIR_CHECKER_WRITES and WEIR_CHECKER_VARIANT count; docs/freshness-checker.md.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

cargo build --locked -p weir -p storefront --features weir/unsound
install -D "$target/debug/weir" "$target/checker/weir-unsound"
cargo build --locked -p weir -p storefront
if [ "${1:-}" = --release ]; then
    cargo build --locked --release -p weir
    export WEIR_BIN=$target/release/weir
fi
WEIR_CHECKER_UNSOUND=$target/checker/weir-unsound \
    cargo test --locked -p weir-tests --test it -- --nocapture --test-threads=1 checker:: </dev/null
