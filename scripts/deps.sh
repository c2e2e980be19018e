#!/usr/bin/env bash
# Installs what a make target needs and this machine lacks: deps.sh demo|test|bench
#
# On Debian and Ubuntu it says what is missing and why, then asks apt-get for it (through sudo unless we are root). On any
# other system it prints what to install and stops. It never starts a database: weir's tools start their own throw-away
# servers on free ports, and a fresh PostgreSQL package is told not to create its usual cluster on port 5432.
set -euo pipefail

purpose=${1:-test}
case $purpose in
demo | test | bench) ;;
*) echo "usage: $0 demo|test|bench" >&2 && exit 2 ;;
esac

has() { command -v "$1" >/dev/null 2>&1; }

# As weir-local looks for it: PG_BIN alone if set, then PATH, then one directory per version.
has_postgres() {
    local dir
    if [ -n "${PG_BIN:-}" ]; then
        [ -x "$PG_BIN/initdb" ] && [ -x "$PG_BIN/postgres" ]
        return
    fi
    has initdb && has postgres && return
    for dir in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && return
    done
    return 1
}

packages=() # Debian's names of what is missing
missing=()  # the same for people, with the reason
need() { # need PACKAGE "what: why"
    packages+=("$1")
    missing+=("$2")
}

has cc || need build-essential "a C compiler and linker: Rust links with it, and the TLS library's assembly is built with it"
has_postgres || need postgresql "PostgreSQL server: the shards, replicas and hub are real clusters, started and removed by weir"
has redis-server || has valkey-server || need redis-server "Redis server: the shared second level of the cache"
if [ "$purpose" = bench ]; then
    has pgbouncer || [ -x /usr/sbin/pgbouncer ] || need pgbouncer "PgBouncer: what weir is measured against"
fi

if [ ${#packages[@]} -gt 0 ]; then
    echo "make $purpose needs what this machine does not have:"
    printf '  - %s\n' "${missing[@]}"
    if ! has apt-get; then
        echo
        echo "This is not Debian or Ubuntu, so please install it yourself and run make $purpose again:"
        case $(uname -s) in
        Darwin) echo "  xcode-select --install; brew install postgresql@17 redis pgbouncer" ;;
        *)
            echo "  Fedora, RHEL:  sudo dnf install gcc postgresql-server postgresql-contrib redis pgbouncer"
            echo "  Arch:          sudo pacman -S base-devel postgresql redis pgbouncer"
            echo "  Alpine:        apk add build-base postgresql postgresql-contrib redis pgbouncer bash"
            ;;
        esac
        exit 1
    fi
    root=()
    if [ "$(id -u)" -ne 0 ]; then
        has sudo || { echo "Not root and no sudo here. As root: apt-get install ${packages[*]}" >&2 && exit 1; }
        root=(sudo)
    fi
    echo "Installing ${packages[*]} with: ${root[*]:+${root[*]} }apt-get install"
    # The package's own cluster would take port 5432 and memory for nothing. Someone's existing choice is left alone.
    defaults=/etc/postgresql-common/createcluster.conf
    if [[ " ${packages[*]} " == *" postgresql "* && ! -e $defaults ]]; then
        echo "Writing create_main_cluster = false to $defaults, so that no cluster of its own is started"
        "${root[@]}" mkdir -p "${defaults%/*}"
        echo "create_main_cluster = false" | "${root[@]}" tee "$defaults" >/dev/null
    fi
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update </dev/null
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        -o Dpkg::Options::=--force-confold "${packages[@]}" </dev/null
    for service in redis-server pgbouncer; do
        if [[ " ${packages[*]} " == *" $service "* && -d /run/systemd/system ]]; then
            echo "Note: Debian also starts a $service service of its own. weir does not use it; to stop it:" \
                "sudo systemctl disable --now $service"
        fi
    done
    has_postgres || { echo "PostgreSQL was installed, but initdb and postgres are still not found; set PG_BIN" >&2 && exit 1; }
fi

if ! has cargo; then
    # A fresh rustup is not in PATH before the next log-in.
    if [ -x "$HOME/.cargo/bin/cargo" ]; then
        echo "cargo is installed but not in PATH. Run: . \"\$HOME/.cargo/env\"" >&2
    else
        echo "Rust is missing. Install it as https://rustup.rs says, then run make $purpose again." >&2
    fi
    exit 1
fi
