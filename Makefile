PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
READY := .venv/.ready

# Two at once, the files of tests/conftest.py's PROCESSES one after the other: on two cores more is slower.
TESTS := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

.PHONY: run test slow deployment fuzz check bench docs unit .venv

run: $(READY)  ## the offline demonstration
	@$(BIN)/fedsynth run hospitals

test: $(READY)
	@$(TESTS)

unit: $(READY)  ## what starts no process: under a minute on two cores
	@$(TESTS) -m unit

slow: $(READY)  ## what takes too long for `make test`, but for the deployments
	@$(TESTS) -m "full and not deployment" --timeout 600

deployment: $(READY)  ## real processes over TLS, killed, cut off and filled up: some 30 minutes
	@$(BIN)/python -m pytest -m deployment --timeout 600

fuzz: $(READY)  ## at night: 100,000 broken inputs of every reader of others' bytes, some minutes
	@$(BIN)/python tests/fuzz.py --inputs 100000

check: $(READY)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

bench: $(READY)  ## time and memory; the other benchmarks give the tables of docs/results.md, by hand
	@set -e; for each in privacy "dp_step --repeats 3" stacked generation throughput; do set -- $$each; echo "$$1"; \
	$(BIN)/python simulations/benchmarks/$$1.py $$2 $$3; done

docs: $(READY)  ## the pages of docs/ as a site, in site/
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv: $(READY)

# torch comes first and by itself, so that whoever has a build of it of their own keeps it.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install torch==2.13.0
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
