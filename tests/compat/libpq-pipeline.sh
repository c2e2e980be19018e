#!/usr/bin/env bash
# libpq's pipeline tests (src/test/modules/libpq_pipeline), directly and through weir.
#
#   tests/compat/libpq-pipeline.sh [SOURCE]
#
# SOURCE as for regress.sh. Each test must pass through weir if it passes directly; where Postgres's own script compares
# a trace of the protocol, both traces must be equal. Exceptions: exceptions/libpq-pipeline.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/stage.sh"
. "$here/source.sh"

out=${OUT:-$work/libpq-pipeline}
mkdir -p "$out"
stage_dir
source_tree "${1:-}"
source_build src/test/modules/libpq_pipeline
program=$build/src/test/modules/libpq_pipeline/libpq_pipeline
stage_start_postgres
for database in way_direct way_weir; do
    PGPORT=$PG_PORT psql -qX -d postgres -c "CREATE DATABASE $database"
done
stage_start_weir way_weir

passed_directly=0 passed=0 unexpected=
for test in $("$program" tests); do
    for way in direct weir; do
        port=$PG_PORT
        [ "$way" = direct ] || port=$WEIR_PORT
        trace=()
        [ ! -f "$source/src/test/modules/libpq_pipeline/traces/$test.trace" ] || trace=(-t "$out/$test.$way.trace")
        # Options as in t/001_libpq_pipeline.pl, so that traces do not depend on the server's settings.
        if PGOPTIONS="-c lc_messages=C -c force_parallel_mode=off" \
            timeout 60 "$program" "${trace[@]}" "$test" "host=127.0.0.1 port=$port dbname=way_$way sslmode=disable" \
            >"$out/$test.$way.log" 2>&1; then result=ok; else result=failed; fi
        [ "$way" = weir ] || { direct=$result; continue; }
    done
    [ "$direct" = ok ] || { echo "$test: fails directly too"; continue; }
    passed_directly=$((passed_directly + 1))
    if [ "$result" = ok ] && [ "${#trace[@]}" -gt 0 ] && ! diff -u "$out/$test.direct.trace" "$out/$test.weir.trace" \
        >"$out/$test.trace.diff"; then
        result="another trace"
    fi
    if [ "$result" = ok ]; then
        passed=$((passed + 1))
    else
        echo "$test: $result through weir"
        grep -q "^$test:" "$here/exceptions/libpq-pipeline.txt" || unexpected="$unexpected $test"
    fi
done
echo "directly: $passed_directly tests pass · through weir: $passed"
[ -z "$unexpected" ] || { echo "not listed as exceptions:$unexpected"; exit 1; }
