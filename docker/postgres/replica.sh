#!/bin/bash
# Becomes a streaming replica of PRIMARY_HOST: copies it once, then starts like any server of this image.
set -euo pipefail

: "${PRIMARY_HOST:?the service to follow}"
: "${REPLICATION_PASSWORD:?the password of role replicator on it}"
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown postgres:postgres "$PGDATA"
    chmod 700 "$PGDATA"
    exec gosu postgres "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    # A copy that was cut off leaves no PG_VERSION that pg_basebackup would accept beside it: start from nothing.
    find "$PGDATA" -mindepth 1 -delete
    PGPASSWORD=$REPLICATION_PASSWORD pg_basebackup --pgdata "$PGDATA" --write-recovery-conf --wal-method stream \
        --checkpoint fast --slot replica \
        --dbname "host=$PRIMARY_HOST port=5432 user=replicator application_name=$HOSTNAME connect_timeout=10"
fi
unset REPLICATION_PASSWORD
exec docker-entrypoint.sh "$@"
