# weir: every target installs what it needs (saying what and why first), then does one thing.
# `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test checker service bench fmt lint deps fuzz

# Extra arguments for `weir dev`, for example: make demo DEMO_ARGS="--shards 4 --replicas 0 --keep"
DEMO_ARGS ?=
# How long each fuzz target runs, for example: make fuzz FUZZ_SECONDS=60
FUZZ_SECONDS ?= 300
# For an optimised weir in the long run of the checker: make checker CHECKER_ARGS=--release
CHECKER_ARGS ?=
# Extra arguments for the benchmark, for example: make bench BENCH_ARGS="--quick"
BENCH_ARGS ?=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: ## Start the whole tier on this machine: shards, replicas, Redis, weir, storefront. Ctrl-C removes it all
	@scripts/deps.sh demo
	cargo build --release --locked -p weir -p storefront
	@scripts/catalogue.sh
	@catalogue=$$(ls .demo/catalogue.csv 2>/dev/null || true); \
	exec target/release/weir dev $${catalogue:+--catalogue "$$catalogue"} $(DEMO_ARGS)

test: ## Build everything and run every test against real servers, then print the totals
	@scripts/deps.sh test
	cargo build --locked --workspace
	@scripts/test.sh

checker: ## Break weir on purpose, a step at a time, and print what the freshness checker notices (a quarter of an hour)
	@scripts/deps.sh test
	@scripts/checker.sh $(CHECKER_ARGS)

service: ## Build target/service/weir, optimised for service (takes some minutes)
	@scripts/deps.sh bench
	@scripts/service.sh

bench: ## Compare weir with direct Postgres, PgBouncer and Redis, in one run on this machine
	@scripts/deps.sh bench
	@scripts/service.sh
	cargo build --release --locked -p weir-bench
	target/release/weir-bench --weir target/service/weir $(BENCH_ARGS)

fuzz: ## Fuzz the parsers of hostile bytes, each for FUZZ_SECONDS (needs a nightly compiler; installs cargo-fuzz)
	@scripts/fuzz.sh "$(FUZZ_SECONDS)"

fmt: ## Format the sources
	cargo fmt --all

lint: ## Check formatting and lints, as CI does
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

deps: ## Install the servers that tests and the demo start (PostgreSQL, Redis), if they are missing
	@scripts/deps.sh test
