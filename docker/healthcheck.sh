#!/bin/bash
# healthcheck PORT PATH: does this container answer HTTP 200 there? bash alone, so that the image needs no HTTP client.
set -euo pipefail

port=$1 path=$2
exec 3<>"/dev/tcp/127.0.0.1/$port"
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$path" >&3
read -r -t 3 _ status _ <&3
[ "$status" = 200 ]
