#!/usr/bin/env bash
# The freshness checker at length: a weir that can be broken on purpose, the table of what was caught, then reads and disturbances.
# Takes about a quarter of an hour. WEIR_CHECKER_READS, WEIR_CHECKER_SEED and WEIR_CHECKER_WRITES count; docs/freshness-checker.md.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

cargo build --locked -p weir -p storefront --features weir/unsound
install -D "$target/debug/weir" "$target/checker/weir-unsound"
cargo build --locked -p weir -p storefront
WEIR_CHECKER_UNSOUND=$target/checker/weir-unsound \
    cargo test --locked -p weir-tests --test it -- --nocapture --test-threads=1 checker:: </dev/null
