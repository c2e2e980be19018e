# shellcheck shell=bash
# A stage for an outside suite, to be sourced: one throw-away Postgres 15, and weir with default settings in front of it.
#
#   stage_dir             a directory of its own, removed at exit unless KEEP=1
#   stage_start DB...     starts both; afterwards PG_PORT, WEIR_PORT, PGUSER and PGPASSWORD (a superuser) are set
#   stage_as COMMAND...   runs a command as the account of the servers: ourselves, or postgres if we are root
#
# weir is taken from WEIR_BIN, else from the last build.

PG_BIN=${PG_BIN:-/usr/lib/postgresql/15/bin}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# What is fetched and built, and what the suites said.
work=${CARGO_TARGET_DIR:-$repo/target}/compat

stage_as() {
    if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

stage_dir() {
    stage=$(mktemp -d "${TMPDIR:-/tmp}/weir-compat.XXXXXX")
    chmod 755 "$stage"
    [ "$(id -u)" != 0 ] || chown postgres "$stage"
    trap stage_stop EXIT
}

stage_stop() {
    stage_stop_weir
    stage_stop_postgres
    if [ "${KEEP:-0}" = 1 ]; then echo "kept: $stage"; else rm -rf "$stage"; fi
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

stage_start() {
    stage_start_postgres
    stage_start_weir "$@"
}

# Settings as pg_regress makes them for a server of its own; anything more in STAGE_POSTGRES_CONF.
stage_start_postgres() {
    export PGUSER=postgres PGPASSWORD=stage-password PGHOST=127.0.0.1
    PG_PORT=${PG_PORT:-$(free_port)}
    stage_as rm -rf "$stage/pg"
    echo "$PGPASSWORD" >"$stage/password"
    stage_as "$PG_BIN/initdb" -D "$stage/pg" -U "$PGUSER" -A scram-sha-256 --no-locale -E UTF8 \
        --pwfile="$stage/password" --no-sync >"$stage/initdb.log"
    stage_as tee -a "$stage/pg/postgresql.conf" >/dev/null <<CONF
port = $PG_PORT
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
max_connections = 200
max_prepared_transactions = 10
${STAGE_POSTGRES_CONF:-}
CONF
    stage_as "$PG_BIN/pg_ctl" -D "$stage/pg" -l "$stage/pg.log" -w start >/dev/null
}

stage_stop_postgres() {
    [ ! -f "$stage/pg/postmaster.pid" ] || stage_as "$PG_BIN/pg_ctl" -D "$stage/pg" -m immediate stop >/dev/null || true
}

# One section per database and the login of a superuser: everything else is weir's default. More in STAGE_WEIR_CONF.
stage_start_weir() {
    local weir=${WEIR_BIN:-${CARGO_TARGET_DIR:-$repo/target}/debug/weir} database user
    WEIR_PORT=${WEIR_PORT:-$(free_port)}
    mkdir -p "$stage/weir"
    {
        printf 'listen = "127.0.0.1:%s"\nhttp_listen = "127.0.0.1:%s"\nusers_file = "users.toml"\n' \
            "$WEIR_PORT" "$(free_port)"
        printf 'admin_users = ["%s"]\n' "$PGUSER"
        for database in "$@"; do
            printf '\n[[database.%s.shard]]\nname = "only"\nprimary = "127.0.0.1:%s"\n' "$database" "$PG_PORT"
        done
        printf '\n[server_auth]\nuser = "%s"\npassword_file = "admin.pw"\n' "$PGUSER"
        printf '%s\n' "${STAGE_WEIR_CONF:-}"
    } >"$stage/weir/weir.toml"
    for user in "$PGUSER" ${STAGE_USERS:-}; do
        printf '[user.%s]\npassword = "%s"\n' "$user" "$PGPASSWORD"
    done >"$stage/weir/users.toml"
    echo "$PGPASSWORD" >"$stage/weir/admin.pw"
    chmod 600 "$stage/weir/"*
    "$weir" run --config "$stage/weir/weir.toml" >"$stage/weir/log" 2>&1 &
    weir_pid=$!
    for _ in $(seq 100); do
        ! "$PG_BIN/pg_isready" -q -h 127.0.0.1 -p "$WEIR_PORT" || return 0
        kill -0 "$weir_pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$stage/weir/log" >&2
    return 1
}

stage_stop_weir() {
    if [ -n "${weir_pid:-}" ]; then
        kill "$weir_pid" 2>/dev/null || true
        wait "$weir_pid" 2>/dev/null || true
        weir_pid=
    fi
}
