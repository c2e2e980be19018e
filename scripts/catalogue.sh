#!/usr/bin/env bash
# Puts a real product catalogue at .demo/catalogue.csv, once. The demo must start without it, so nothing here is fatal:
# without Python, network or time the storefront loads its small generated catalogue instead.
set -uo pipefail
cd "$(dirname "$0")/.."

target=.demo
if [ -s $target/catalogue.csv ]; then
    exit 0
fi
if ! command -v python3 >/dev/null 2>&1; then
    echo "No python3 here: the shop opens with its generated catalogue."
    exit 0
fi
echo "Fetching a catalogue of real products (data for research and education: installed, never committed). At most 4 minutes."
mkdir -p $target
limit=()
if command -v timeout >/dev/null 2>&1; then limit=(timeout 240); fi
if ! ${limit[@]+"${limit[@]}"} python3 storefront/catalogue/fetch.py $target </dev/null || [ ! -s $target/catalogue.csv ]; then
    rm -f $target/catalogue.csv
    echo "The real catalogue is not available: the shop opens with its generated one."
fi
exit 0
