#!/bin/bash
# Writes the users file that weir.toml names from the environment, readable by weir alone, then becomes weir.
set -euo pipefail

: "${SHOP_PASSWORD:?the password of user shop, who the storefront logs in as}"
: "${METRICS_PASSWORD:?the password of user metrics, who may look at the admin database}"
for password in "$SHOP_PASSWORD" "$METRICS_PASSWORD"; do
    # They are written into TOML here and into URLs in docker-compose.yml.
    if [[ ! $password =~ ^[A-Za-z0-9._~-]+$ ]]; then
        echo "passwords may hold letters, digits and . _ ~ - only: try openssl rand -hex 24" >&2
        exit 2
    fi
done

umask 077
cat >/run/weir/users.toml <<TOML
[user.shop]
password = "$SHOP_PASSWORD"

[user.metrics]
password = "$METRICS_PASSWORD"
TOML
unset SHOP_PASSWORD METRICS_PASSWORD
exec "$@"
