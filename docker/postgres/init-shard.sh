#!/bin/bash
# Runs once, in an empty primary: the application's role and database, and the role that its replica streams as.
set -euo pipefail

: "${SHOP_PASSWORD:?the password of role shop}"
: "${REPLICATION_PASSWORD:?the password of role replicator}"
psql --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 \
    --set shop_password="$SHOP_PASSWORD" --set replication_password="$REPLICATION_PASSWORD" <<'SQL'
CREATE ROLE shop LOGIN PASSWORD :'shop_password';
CREATE DATABASE shop OWNER shop;
CREATE ROLE replicator LOGIN REPLICATION PASSWORD :'replication_password';
SELECT pg_create_physical_replication_slot('replica');
SQL
# The image's own rule covers databases only; streaming asks for the keyword `replication`.
echo "host replication replicator samenet scram-sha-256" >>"$PGDATA/pg_hba.conf"
