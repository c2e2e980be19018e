#!/usr/bin/env bash
# node-postgres's own integration tests, directly and through weir.
#
#   tests/compat/node-postgres.sh SOURCE
#
# SOURCE is a checkout of its repository (the npm packages hold no tests). The packages it needs come from npm. Exceptions:
# exceptions/node-postgres.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/stage.sh"

source=$(cd "${1:?usage: node-postgres.sh SOURCE}" && pwd)
out=${OUT:-$work/node-postgres}
mkdir -p "$out/pg"
stage_dir

# A copy without the tools of its developers.
cp -r "$source/packages/pg/lib" "$source/packages/pg/test" "$out/pg/"
if [ ! -d "$out/pg/node_modules" ]; then
    node -e '
        const fs = require("fs")
        const [from, to] = process.argv.slice(1)
        const all = JSON.parse(fs.readFileSync(from))
        const tests = ["async", "bluebird", "co", "pg-copy-streams"]
        for (const name of tests) all.dependencies[name] = all.devDependencies[name]
        delete all.devDependencies
        delete all.optionalDependencies
        delete all.peerDependencies
        fs.writeFileSync(to, JSON.stringify(all))
    ' "$source/packages/pg/package.json" "$out/pg/package.json"
    (cd "$out/pg" && npm install --no-audit --no-fund --ignore-scripts >"$out/npm.log" 2>&1)
fi

# The suite takes a URL; SCRAM users are told apart by environment variables, as in its own pipeline.
export SCRAM_TEST_PGUSER=scram_test SCRAM_TEST_PGPASSWORD=stage-password
export STAGE_USERS=scram_test
stage_start_postgres
PGPORT=$PG_PORT psql -qX -d postgres -c "CREATE ROLE scram_test LOGIN PASSWORD '$PGPASSWORD'" \
    -c "CREATE DATABASE ci_db_direct" -c "CREATE DATABASE ci_db_weir"
stage_start_weir ci_db_weir template1

run() {
    local way=$1 port=$2 file=$3
    (cd "$out/pg" && PGPORT=$port PGDATABASE=ci_db_$way PGTESTNOSSL=true \
        timeout "${TEST_TIME_MAX:-60}" node "$file" "postgres://$PGUSER:$PGPASSWORD@127.0.0.1:$port/ci_db_$way") \
        >"$out/$(echo "$file" | tr / _).$way.log" 2>&1
}

passed_directly=0 passed=0 unexpected=
cd "$out/pg"
for file in ${TESTS:-$(find test/integration -name '*-tests.js' | sort)}; do
    if ! run direct "$PG_PORT" "$file"; then
        echo "$file: fails directly too"
        continue
    fi
    passed_directly=$((passed_directly + 1))
    if run weir "$WEIR_PORT" "$file"; then
        passed=$((passed + 1))
    else
        echo "$file: fails through weir"
        grep -q "^$file:" "$here/exceptions/node-postgres.txt" || unexpected="$unexpected $file"
    fi
done
echo "directly: $passed_directly files pass · through weir: $passed"
[ -z "$unexpected" ] || { echo "not listed as exceptions:$unexpected"; exit 1; }
