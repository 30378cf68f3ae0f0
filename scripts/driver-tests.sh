#!/usr/bin/env bash
# Runs the tests of the repository of @neondatabase/serverless, unmodified, against a Dormouse of their own: docs/serverless.md has
# the results. Needs root (a network and a hosts file for itself), git, Node.js 22 or later with npm, and a release build.
#   scripts/driver-tests.sh <clone of the repository>
set -euo pipefail
cd "$(dirname "$0")/.."

# The tests look for this domain in their connection string, and use the ports that it would have.
DOMAIN=local.neon.tech

if [ "${1:-}" != --inside ]; then
    source=${1:?say where a clone of the repository neondatabase/serverless is}
    [ -d "$source/node_modules" ] || (cd "$source" && npm ci --silent --no-fund --no-audit)
    exec unshare --net --mount "$0" --inside "$(realpath "$source")"
fi

source=$2
home=$(mktemp -d)
chmod 755 "$home"
ip link set lo up
target/release/dormouse up --data-dir "$home/data" --runtime-dir "/dev/shm/dormouse-driver-$$" --pg-port 5432 --http-port 443 \
    --domain "$DOMAIN" >"$home/log" 2>&1 &
up=$!
trap 'kill $up; wait $up || true; rm -rf "$home"' EXIT
dormouse() { target/release/dormouse "$@" --data-dir "$home/data"; }
for _ in $(seq 100); do
    dormouse projects list >"$home/said" 2>&1 && break
    sleep 0.3
done
dormouse projects create --name driver >"$home/said"
uri=$(dormouse connection-string)
endpoint=$(grep -o 'ep-[a-z0-9-]*' <<<"$uri" | head -n 1)
printf '127.0.0.1 localhost api.%s %s.%s %s-pooler.%s\n' "$DOMAIN" "$endpoint" "$DOMAIN" "$endpoint" "$DOMAIN" >"$home/hosts"
mount --bind "$home/hosts" /etc/hosts

export VITE_NEON_DB_URL=$uri VITE_NEON_DB_POOLER_URL=${uri/$endpoint/$endpoint-pooler}
export VITE_WSPROXY=$endpoint.$DOMAIN/v2 VITE_CLERK_USER=none VITE_CLERK_SECRET_KEY=none
export NODE_EXTRA_CA_CERTS=$home/data/tls/ca.pem WRANGLER_SEND_METRICS=false CI=1
cd "$source"
failed=0
run() { npx vitest run --config=tests/vite.config.mts --reporter=verbose "$@" || failed=1; }
run --dir=tests/cli --environment=node
run --dir=tests/cli --environment=edge-runtime
run --dir=tests/packages --environment=node
run --dir=tests/cloudflare
exit $failed
