# shellcheck shell=bash
# Postgres's source tree and what suites need of it, to be sourced after stage.sh.
#
#   source_tree [DIR]     sets `source`: DIR, or Debian's source package, fetched once into compat/postgresql-15 in the target directory
#   source_build DIR...   configures and builds these directories of it; sets `build`
#
# apt-get source needs a deb-src line for the release; no other part of the system is touched.

source_tree() {
    source=${1:-$work/postgresql-15}
    [ -d "$source/src/test/regress" ] || (
        mkdir -p "$(dirname "$source")/fetched"
        cd "$(dirname "$source")/fetched"
        apt-get source --download-only postgresql-15
        dpkg-source --no-check -x postgresql-15_*.dsc "$source"
    )
    source=$(cd "$source" && pwd)
}

source_build() {
    build=${PG_BUILD:-$work/postgresql-15-build}
    mkdir -p "$build"
    (
        cd "$build"
        [ -f config.status ] || "$source/configure" --without-readline --without-zlib CFLAGS=-O1
        make -s -j2 -C src/backend generated-headers
        for directory in "$@"; do make -s -j2 -C "$directory" all; done
    ) >"$build.log" 2>&1 || { tail -20 "$build.log" >&2; return 1; }
}
