#!/usr/bin/env bash
# Installs what building and testing Dormouse needs and is not there yet (Debian 12, Rust already installed):
#   scripts/setup.sh            PostgreSQL 15 and a C compiler
#   scripts/setup.sh pgbouncer  also PgBouncer for the benchmark of pooling, into target/tools/pgbouncer: as a package it would be started
#   scripts/setup.sh acme       also Pebble, an ACME server for the tests, into target/tools/pebble
#   scripts/setup.sh clients    also the clients of `make clients`, into target/tools/clients
#   scripts/setup.sh s3         also an S3-compatible server for the tests (moto, in a virtual environment of its own)
#   scripts/setup.sh examples   also Node.js and the packages of examples/ and of the tests of the serverless driver, into examples/node_modules
# Several at once: scripts/setup.sh s3 examples
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

wants() { [[ " $arguments " == *" $1 "* ]]; }
arguments=$*

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

missing=()
[ -x "${PG_BIN_DIR:-/usr/lib/postgresql/15/bin}/postgres" ] || missing+=(postgresql-15 postgresql-client-15)
command -v cc >/dev/null || missing+=(gcc libc6-dev)
if wants s3; then
    command -v python3 >/dev/null || missing+=(python3)
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
fi
if wants clients; then
    command -v python3 >/dev/null || missing+=(python3)
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    command -v npm >/dev/null || missing+=(nodejs npm)
    command -v javac >/dev/null || missing+=(openjdk-17-jdk-headless)
fi
if wants examples; then
    command -v npm >/dev/null || missing+=(nodejs npm)
fi
if wants pgbouncer; then
    for library in libevent-2.1-7 libc-ares2; do
        dpkg -s "$library" >/dev/null 2>&1 || missing+=("$library")
    done
fi

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        say "please install: ${missing[*]} (this script only knows Debian's apt-get)"
        exit 1
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -qq
    if [[ " ${missing[*]} " == *" postgresql-15 "* ]]; then
        # Debian starts a server on port 5432 when it installs PostgreSQL; Dormouse needs the programs only.
        as_root apt-get install -y -qq --no-install-recommends postgresql-common >/dev/null
        if [ ! -e /usr/lib/postgresql ] && [ -f /etc/postgresql-common/createcluster.conf ]; then
            as_root sed -i 's/^#\?create_main_cluster *=.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
        fi
    fi
    as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if wants s3 && [ ! -x target/tools/moto/bin/moto_server ]; then
    say "installing moto (an S3-compatible server) into target/tools/moto"
    mkdir -p target/tools
    python3 -m venv target/tools/moto
    target/tools/moto/bin/pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
fi

# Debian packages unpacked into a directory: installed, some would start servers or take the place of others.
unpack() {
    local directory=$1
    shift
    mkdir -p "$directory"
    as_root apt-get update -qq
    (cd "$directory" && for package in "$@"; do apt-get download -qq "$package" 2>/dev/null; done && for file in *.deb; do dpkg -x "$file" .; done)
}

if wants pgbouncer && [ ! -x target/tools/pgbouncer/usr/sbin/pgbouncer ]; then
    say "unpacking PgBouncer into target/tools/pgbouncer"
    unpack target/tools/pgbouncer pgbouncer
fi

if wants acme && [ ! -x target/tools/pebble/usr/bin/pebble ]; then
    say "unpacking Pebble (an ACME server) into target/tools/pebble"
    unpack target/tools/pebble pebble
fi

if wants clients && [ ! -e target/tools/clients/ready ]; then
    say "installing clients into target/tools/clients"
    mkdir -p target/tools/clients
    python3 -m venv target/tools/clients/venv
    target/tools/clients/venv/bin/pip install --quiet --disable-pip-version-check \
        'psycopg[binary]==3.3.*' 'asyncpg==0.31.*' 'SQLAlchemy==2.1.*'
    (cd target/tools/clients && npm install --silent --no-fund --no-audit pg@8 postgres@3 drizzle-orm@0.45)
    unpack target/tools/clients/jdbc libpostgresql-jdbc-java libscram-java libstringprep-java
    touch target/tools/clients/ready
fi

if wants examples && ! cmp -s examples/package-lock.json examples/node_modules/.installed; then
    say "installing the packages of the examples into examples/node_modules"
    (cd examples && npm ci --silent --no-fund --no-audit)
    # Its migrations' engine is not a package; the client is made without it.
    (cd examples && PATH="$PWD/node_modules/.bin:$PATH" CHECKPOINT_DISABLE=1 PRISMA_SCHEMA_ENGINE_BINARY=/bin/true \
        prisma generate --schema prisma/schema.prisma >/dev/null)
    cp examples/package-lock.json examples/node_modules/.installed
fi
