# Tidegate. `make` alone lists what there is.
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := $(BIN)/python -m uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
.PHONY: help install demo chaos dev test test-fast lint format types imports docs manifests features lock e2e-k8s sim sim-mutants bench dataset bench-compare clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk 'BEGIN {FS = ":.*## "} {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tidegate needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,kubernetes]' --group dev
	@touch $@

install: $(STAMP) ## Make .venv with everything that development needs

demo: $(STAMP) ## The refund demo: an executor is killed in the middle, the customer is paid once
	$(BIN)/tidegate demo

chaos: $(STAMP) ## 100 runs while every process and Kafka are killed, frozen and restarted (SEED=… repeats the blows)
	$(BIN)/tidegate demo chaos-100 $(if $(SEED),--seed $(SEED))

dev: $(STAMP) ## Kafka, ClickHouse and all services on this machine, until Ctrl-C
	$(BIN)/tidegate dev

test: lint types imports ## Everything that CI checks (JOBS=2 tests at a time, each with brokers of its own)
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

test-fast: $(STAMP) ## Only the tests that need no broker
	$(BIN)/pytest tests/unit tests/tidy tests/deploy

lint: $(STAMP) ## ruff, over code and format
	$(BIN)/ruff check services tests k8s
	$(BIN)/ruff format --check services tests k8s

format: $(STAMP) ## Let ruff format and mend what it can
	$(BIN)/ruff check --fix services tests k8s
	$(BIN)/ruff format services tests k8s

types: $(STAMP) ## mypy --strict over the package
	$(BIN)/mypy

imports: $(STAMP) ## Who may know whom (import-linter)
	$(BIN)/lint-imports

features: $(STAMP) ## Each row of docs/features.md with the tests that show it
	$(BIN)/python tests/features.py

manifests: $(STAMP) ## Write the dashboards anew from their panels, then k8s/ from the chart and from schemas/topics
	$(BIN)/python -m tidegate.projection.dashboards charts/tidegate/dashboards
	$(BIN)/python k8s/render.py

lock: $(STAMP) ## Resolve the image's locks anew: what is pinned stays, unless pyproject.toml forbids it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) pyproject.toml --extra clickhouse --extra gateway --extra kubernetes -o services/requirements.lock
	$(LOCK) pyproject.toml services/requirements-embedded.in --extra clickhouse --extra gateway --extra kubernetes -c services/requirements.lock -o services/requirements-embedded.lock
	$(LOCK) services/requirements-build.in -o services/requirements-build.lock

docs: $(STAMP) ## Write the generated pages of docs/ anew
	$(BIN)/tidegate topics docs
	$(BIN)/python -m tidegate.projection.schema_page docs/clickhouse.md
	$(BIN)/python -m tidegate.reference

sim: $(STAMP) ## Everything on a log in memory while everything goes wrong (SEED=1 STEPS=4000 MINUTES=0)
	PYTHONPATH=tests $(BIN)/python -m simulation --seed $(or $(SEED),1) --steps $(or $(STEPS),4000) --minutes $(or $(MINUTES),0)

sim-mutants: $(STAMP) ## Take the rules out of the code one by one: the simulation must notice each
	$(BIN)/pytest tests/simulation/test_mutants.py

bench: $(STAMP) ## W1 to W6: throughput, latency, recovery, restart, rebuild (about three minutes)
	$(BIN)/tidegate bench

dataset: $(STAMP) ## A day of real runs, a million events, kept in DIR=.tidegate/dataset for `tidegate bench --works W6 --dataset` (RUNS=45000)
	$(BIN)/python -m tidegate.bench.dataset $(or $(DIR),.tidegate/dataset) --runs $(or $(RUNS),45000)

bench-compare: $(STAMP) ## The same works on BASE=ref and on this tree, turn by turn, with ratios (WORKS=W1,W2 ROUNDS=3)
	$(BIN)/python tests/benchmarks/compare.py $(BASE) --works $(or $(WORKS),W1,W2) --rounds $(or $(ROUNDS),3)

e2e-k8s: $(STAMP) ## The chart on the cluster of KUBECONFIG: install, runs, kills, upgrade, drain, uninstall (tests/e2e/README.md)
	TIDEGATE_E2E=1 $(BIN)/python -m pytest -q -s tests/e2e

clean: ## Remove the environment, caches and development data
	rm -rf $(VENV) .tidegate .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
