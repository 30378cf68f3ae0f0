#!/usr/bin/env bash
# PostgreSQL's own tests: the source of the installed version's branch, and the headers to build what they load.
# Prints the directory of the source as the only line on standard output. Needs nothing else to have run before.
#
#   source=$(scripts/postgres-source.sh)
#   source=$(scripts/postgres-source.sh languages)    also PL/Perl and PL/Python, which some contrib modules transform for
#
# The source comes from Debian with `apt-get source`, through a private list of its own in target/tools: the machine's
# own sources.list stays as it is. It is of the release's pocket (15.18), also where the server is a later 15.x: so compare
# with a stock server in the same run and not with the expected output that comes with it.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

scripts/setup.sh >&2

# The headers must be of the server that is there; a later one would bring a later server along.
install_missing() {
    local version language missing=()
    version=$(dpkg-query -W -f '${Version}' postgresql-15)
    [ -e /usr/include/postgresql/15/server/postgres.h ] || missing+=("postgresql-server-dev-15=$version" "libpq-dev=$version" "libpq5=$version")
    for language in plperl plpython3; do
        [ "$1" != languages ] || [ -e "/usr/share/postgresql/15/extension/${language}u.control" ] ||
            missing+=("postgresql-$language-15=$version")
    done
    command -v dpkg-source >/dev/null || missing+=(dpkg-dev)
    command -v make >/dev/null || missing+=(make)
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends --allow-downgrades "${missing[@]}" >/dev/null
}

# A private deb-src list with the mirror that this machine's own lists name.
fetch_source() {
    local tools=$1 apt=$1/apt key=/usr/share/keyrings/debian-archive-keyring.gpg signed=
    rm -rf "$apt" && mkdir -p "$apt/lists/partial"
    [ ! -e "$key" ] || signed="[signed-by=$key] "
    apt-get indextargets --format '$(IDENTIFIER) $(ORIGIN) $(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)' |
        awk -v signed="$signed" '$1 == "Packages" && $2 == "Debian" && $4 == $5 && $4 !~ /-/ && $6 == "main" {
            print "deb-src " signed $3, $4, $6 }' | sort -u >"$apt/src.list"
    [ -s "$apt/src.list" ] || { say "no Debian mirror in this machine's apt lists (run apt-get update)"; exit 1; }
    local options=(-qq -o "Dir::Etc::sourcelist=$apt/src.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache::srcpkgcache=" -o "Dir::Cache::pkgcache=" -o APT::Sandbox::User=root)
    say "fetching PostgreSQL's source"
    apt-get "${options[@]}" update >&2
    (cd "$tools" && apt-get "${options[@]}" source postgresql-15 >&2)
    rm -rf "$apt"
}

install_missing "${1:-}"
tools=$PWD/target/tools/postgres-source
found() { compgen -G "$tools/postgresql-15-*/src/test/regress/parallel_schedule" || true; }
if [ -z "$(found)" ]; then
    rm -rf "$tools" && mkdir -p "$tools"
    fetch_source "$tools"
fi
schedule=$(found)
[ -n "$schedule" ] || { say "there is no PostgreSQL source below $tools"; exit 1; }
printf '%s\n' "${schedule%/src/test/regress/parallel_schedule}"
