#!/usr/bin/env bash
# Builds weir for service, in target/service: optimised by what a short load has shown (profile-guided optimisation).
#
# weir is built twice: first with counters, and put under load by weir-bench on throw-away servers (scripts/deps.sh bench
# installs them); then with what was counted. Without rustup's llvm-tools, which read the counts, it is built once and
# without that.
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p')
counted=$PWD/target/service-counted
profile=$counted/weir.profdata

# With --target, the flags are not used for what runs at build time.
build() { # build DIRECTORY FLAGS
    RUSTFLAGS="${RUSTFLAGS:-} $2" cargo build --profile dist --locked -p weir --target "$host" --target-dir "target/$1"
}

deliver() { # deliver FILE
    mkdir -p target/service
    install -m 755 "$1" target/service/weir
    echo "target/service/weir is ready."
}

profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
if [ ! -x "$profdata" ] && ! rustup component add llvm-tools; then
    echo "No llvm-tools here: building without profile-guided optimisation." >&2
    cargo build --profile dist --locked -p weir
    deliver target/dist/weir
    exit
fi

build service-counted "-Cprofile-generate=$counted"
instrumented=$counted/$host/dist/weir
if [ ! -e "$profile" ] || [ "$instrumented" -nt "$profile" ]; then
    cargo build --release --locked -p weir-bench
    rm -rf "$counted/counts"
    echo "Putting it under load for a minute or two."
    LLVM_PROFILE_FILE="$counted/counts/%p.profraw" target/release/weir-bench --quick --weir "$instrumented" \
        --parts pgbench,reads,crowd,bulk,prepared >/dev/null
    "$profdata" merge -sparse -o "$profile" "$counted"/counts/*.profraw
fi
# What the load did not run is not in the profile; that is no warning.
build service-guided "-Cprofile-use=$profile -Cllvm-args=-pgo-warn-missing-function=0"
deliver "target/service-guided/$host/dist/weir"
