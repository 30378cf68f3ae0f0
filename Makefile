# The commands of this repository. Each installs what it needs (see scripts/setup.sh) and asks nothing.
#
#   make demo                    the whole life of a database, explained step by step
#   make demo OBJECT_STORE=s3    the same, against an S3-compatible server that it starts itself
#   make test                    units, simulation, end-to-end against real PostgreSQL, a real S3-compatible server and a real ACME server
#   make regress                 PostgreSQL's core, isolation and contrib tests, beside a stock server (15 minutes)
#   make regress-pooler          PostgreSQL's core tests over a direct connection and through the pool in both modes (5 minutes)
#   make redo-check              WAL redo against PostgreSQL's own pages: its tests, a standby, broken versions of redo (20 minutes)
#   make sim [SEEDS=n]           the consensus and the pageserver on faulty disks, networks and stores, by seeds; `make sim SEED=n` tells one step by step
#   make chaos NAME=quorum [SECONDS=1800]   safekeepers and computes killed, stopped, doubled and cut off at random; nothing acknowledged is lost
#   make model [ARGS=...]        the safekeeper protocol in a model checker, larger than in `make test` (minutes)
#   make clients                 psql, JDBC, node, Python and other clients, direct and pooled, with and without TLS: docs/clients.md
#   make bench [NAME=wake] [ARGS=...]   every benchmark, or one; ARGS=--help tells what can be set
#   make lint                    formatting and lints

OBJECT_STORE ?= local
NAME ?=
ARGS ?=
SEED ?=
SEEDS ?= 3000
SECONDS ?= 1800
SETUP := $(if $(filter s3,$(OBJECT_STORE)),s3,)
bench: SETUP := $(if $(filter-out pool,$(NAME)),,pgbouncer)

.PHONY: demo test clients regress regress-pooler redo-check sim model chaos bench lint build release

build:
	@scripts/setup.sh
	cargo build --workspace --locked

release:
	@scripts/setup.sh $(SETUP)
	cargo build --release --locked -p dormouse -p dormouse-tests -p dormouse-bench -p dormouse-bench-disk

demo: release
	target/release/demo --object-store $(OBJECT_STORE)

test:
	@scripts/setup.sh s3 acme examples
	cargo build --workspace --all-targets --locked
	DORMOUSE_BUILT=1 cargo test --workspace --locked --no-fail-fast

regress: release
	DORMOUSE_TEST_PGSRC="$$(scripts/postgres-source.sh languages)" cargo test --locked -p dormouse-shim-server -- --ignored
	target/release/regress --source "$$(scripts/postgres-source.sh languages)"

regress-pooler: release
	target/release/regress --through pooler --source "$$(scripts/postgres-source.sh)"

redo-check:
	@scripts/setup.sh
	cargo build --release --locked -p dormouse-tests --bin redo-check
	target/release/redo-check --source "$$(scripts/postgres-source.sh)"

sim:
	@cargo build --release --locked -p dormouse-safekeeper-simulation
	@target/release/quorum-sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))
	@DORMOUSE_SIM_SEED=$(SEED) DORMOUSE_SIM_SEEDS=300 cargo test --locked -p dormouse-pageserver --test sim -- --nocapture

model:
	cargo run --release --locked -p dormouse-safekeeper-model -- $(ARGS)

clients: release
	@scripts/setup.sh clients
	target/release/clients --write docs/clients.md

chaos: release
	@target/release/chaos $(if $(NAME),--name $(NAME),) --seconds $(SECONDS)

bench: release
	target/release/bench $(if $(NAME),--name $(NAME),) $(ARGS)

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
