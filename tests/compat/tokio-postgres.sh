#!/usr/bin/env bash
# tokio-postgres's own tests, directly and through weir.
#
#   tests/compat/tokio-postgres.sh SOURCE
#
# SOURCE is a checkout of rust-postgres (the published crate holds no tests). Its tests expect a server on port 5433 that
# trusts its superuser: a copy of them is given other ports and passwords. Exceptions: exceptions/tokio-postgres.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/stage.sh"

source=$(cd "${1:?usage: tokio-postgres.sh SOURCE}" && pwd)
out=${OUT:-$work/tokio-postgres}
mkdir -p "$out"
stage_dir
FEATURES=array-impls,with-bit-vec-0_6,with-chrono-0_4,with-serde_json-1,with-uuid-1

# The ports are compiled in, so each way has its own binary; built once, they are given ports that stay.
DIRECT_PORT=${DIRECT_PORT:-15433}
THROUGH_PORT=${THROUGH_PORT:-15434}
build() {
    local way=$1 port=$2
    rm -rf "$out/$way"
    cp -r "$source" "$out/$way"
    find "$out/$way/tokio-postgres/tests" -name '*.rs' -exec sed -i -E \
        "s/5433/$port/g; s/user=postgres/user=postgres password=stage-password/g; s/(user=(pass|md5|scram)_user[^\"]*) password=password/\1 password=stage-password/g" {} +
    CARGO_TARGET_DIR="$out/target" cargo test --manifest-path "$out/$way/Cargo.toml" -p tokio-postgres \
        --features "$FEATURES" --test test --no-run --message-format=json 2>"$out/$way.build.log" |
        python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "test": print(made["executable"])' >"$out/$way.binary"
    cp "$(cat "$out/$way.binary")" "$out/$way.test"
}
[ "${BUILT:-0}" = 1 ] || { build direct "$DIRECT_PORT"; build weir "$THROUGH_PORT"; }

export STAGE_USERS="pass_user md5_user scram_user"
PG_PORT=$DIRECT_PORT WEIR_PORT=$THROUGH_PORT
stage_start_postgres
PGPORT=$PG_PORT psql -qX -d postgres -v ON_ERROR_STOP=1 <<SQL
CREATE ROLE pass_user PASSWORD '$PGPASSWORD' LOGIN;
CREATE ROLE scram_user PASSWORD '$PGPASSWORD' LOGIN;
SET password_encryption TO md5;
CREATE ROLE md5_user PASSWORD '$PGPASSWORD' LOGIN;
CREATE EXTENSION hstore;
CREATE EXTENSION citext;
CREATE EXTENSION ltree;
SQL
printf 'host all md5_user 127.0.0.1/32 md5\nhost all all 127.0.0.1/32 scram-sha-256\n' |
    stage_as tee "$stage/pg/pg_hba.conf" >/dev/null
stage_as "$PG_BIN/pg_ctl" -D "$stage/pg" reload >/dev/null
stage_start_weir postgres pass_user md5_user scram_user

for way in direct weir; do
    # Its tests share tables by name: one at a time, as Postgres would see them in any order.
    timeout 600 "$out/$way.test" --test-threads=1 >"$out/$way.log" 2>&1 || true
    sed -nE 's/^test (.*) \.\.\. ok$/\1/p' "$out/$way.log" | sort >"$out/$way.passed"
done
lost=$(comm -23 "$out/direct.passed" "$out/weir.passed")
echo "directly: $(wc -l <"$out/direct.passed") tests pass · through weir: $(wc -l <"$out/weir.passed")"
[ -z "$lost" ] || printf 'pass directly, fail through weir:\n%s\n' "$lost"
unexpected=$(comm -23 <(echo "$lost") <(sed -nE 's/^([^#:][A-Za-z0-9_:]*): .*/\1/p' "$here/exceptions/tokio-postgres.txt" | sort))
[ -z "$unexpected" ] || { printf 'not listed as exceptions:\n%s\n' "$unexpected"; exit 1; }
