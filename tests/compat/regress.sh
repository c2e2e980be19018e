#!/usr/bin/env bash
# Postgres's own regression schedule, directly and through weir; every file that passes directly must pass through weir.
#
#   tests/compat/regress.sh [SOURCE]            the parallel schedule
#   TESTS="select join" tests/compat/regress.sh  these files only, after the files they need (test_setup, create_index)
#
# SOURCE is a Postgres 15 source tree; without it, Debian's source package is fetched (see source.sh). The diffs against the
# expected files stay in OUT (default: compat/regress in the target directory). Exit 1 if a file differs that is not
# listed in exceptions/regress.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/stage.sh"
. "$here/source.sh"

out=${OUT:-$work/regress}
mkdir -p "$out"
stage_dir
source_tree "${1:-}"
source_build src/test/regress

# NAME: runs the schedule against a fresh server, leaves $out/NAME.{log,diffs} and $out/NAME.passed.
run() {
    local name=$1 port=$PG_PORT result="$stage/$1"
    stage_as mkdir -p "$result"
    PGPORT=$PG_PORT psql -qX -d postgres -v ON_ERROR_STOP=1 <<SQL
CREATE DATABASE regression TEMPLATE template0;
ALTER DATABASE regression SET lc_messages TO 'C';
ALTER DATABASE regression SET lc_monetary TO 'C';
ALTER DATABASE regression SET lc_numeric TO 'C';
ALTER DATABASE regression SET lc_time TO 'C';
ALTER DATABASE regression SET bytea_output TO 'hex';
ALTER DATABASE regression SET timezone_abbreviations TO 'Default';
SQL
    if [ "$name" = weir ]; then
        stage_start_weir regression postgres
        port=$WEIR_PORT
    fi
    local schedule=("--schedule=$source/src/test/regress/parallel_schedule")
    # shellcheck disable=SC2206 # a list of words
    [ -z "${TESTS:-}" ] || schedule=(test_setup create_index $TESTS)
    # The binary of pg_regress knows where Debian's is, not where ours was built.
    (cd "$result" && stage_as env PGHOST=127.0.0.1 "$build/src/test/regress/pg_regress" \
        --use-existing --user="$PGUSER" --host=127.0.0.1 --port="$port" --dbname=regression \
        --inputdir="$source/src/test/regress" --outputdir="$result" \
        --bindir="$PG_BIN" --dlpath="$build/src/test/regress" --max-concurrent-tests=20 \
        "${schedule[@]}") >"$out/$name.log" 2>&1 || true
    cp "$result/regression.diffs" "$out/$name.diffs" 2>/dev/null || : >"$out/$name.diffs"
    rm -rf "$out/$name.results"
    cp -r "$result/results" "$out/$name.results"
    sed -nE 's/^(test| +| *\.+ *)? *([a-z0-9_.]+) +\.\.\. ok .*/\2/p' "$out/$name.log" | sort >"$out/$name.passed"
}

stage_start_postgres
if [ "${SKIP_DIRECT:-0}" != 1 ]; then
    run direct
    stage_stop_postgres
    stage_start_postgres
fi
run weir

excepted=$(sed -nE 's/^([a-z0-9_.]+)[ :].*/\1/p' "$here/exceptions/regress.txt" | sort)
lost=$(comm -23 "$out/direct.passed" "$out/weir.passed")
echo "directly: $(wc -l <"$out/direct.passed") files pass · through weir: $(wc -l <"$out/weir.passed")"
[ -z "$lost" ] || printf 'pass directly, differ through weir:\n%s\n' "$lost"
unexpected=$(comm -23 <(echo "$lost") <(echo "$excepted"))
[ -z "$unexpected" ] || { printf 'not listed as exceptions:\n%s\n' "$unexpected"; exit 1; }
