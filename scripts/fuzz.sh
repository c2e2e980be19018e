#!/usr/bin/env bash
# Runs every fuzz target for so many seconds, one after the other, on one thread. What it finds stays in fuzz/artifacts; what it
# learns goes to fuzz/target/corpus, so that the corpus in the repository stays small.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-300}
shift || true
if ! rustup run nightly rustc --version >/dev/null 2>&1; then
    echo "Fuzzing needs a nightly compiler: rustup toolchain install nightly" >&2
    exit 1
fi
if ! command -v cargo-fuzz >/dev/null; then
    echo "Installing cargo-fuzz, which drives libFuzzer."
    cargo install --locked cargo-fuzz
fi
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(cargo +nightly fuzz list)
fi
for target in "${targets[@]}"; do
    echo "== $target, $seconds s"
    mkdir -p "fuzz/target/corpus/$target"
    # weir has no unsafe code: its bugs are panics and overflows, which need no sanitizer.
    cargo +nightly fuzz run --sanitizer none "$target" "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=8192 -print_final_stats=1
done
