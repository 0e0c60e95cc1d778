# Needs Python 3.11 to 3.13, make, and a package index. Everything is made below .test/, .demo/ and .cache/.

PYTHON ?= python3
NEWEST := 3.3
OLDEST := 2.11
VERSIONS := 2.11 3.0 3.1 3.2 3.3
PYTEST_ARGS ?=
MUTATION_ARGS ?=
# The system tests run one after another in one of the processes (tests/conftest.py): they mostly wait.
PARALLEL := -n logical --dist loadscope
# Fewer Hypothesis examples than the tests ask for themselves.
FEWER := MAX_EXAMPLES=25

environment = $(PYTHON) scripts/environment.py --airflow $(1) --venv .test/airflow-$(1) --groups $(2)
python = .test/airflow-$(1)/bin/python
newest := $(call python,$(NEWEST))

.PHONY: help demo test test-newest test-oldest unit lint format matrix cluster mutation bench clean $(VERSIONS:%=matrix-%)

help:
	@echo "make demo      the example DAG on a real Airflow against a local SiliconFlow: no key, no cost"
	@echo "make test      lint, types, all tests on Airflow $(NEWEST), the essential ones on $(OLDEST)"
	@echo "make unit      the unit tests on Airflow $(NEWEST)"
	@echo "make lint      lint, types and the directions of imports"
	@echo "make format    format the code and fix what can be fixed"
	@echo "make matrix    the essential tests on Airflow $(VERSIONS)"
	@echo "make cluster   Postgres, two triggerers and faults in both; needs PostgreSQL's programs on this machine"
	@echo "make mutation  put faults into jobs/ and task/, and count those that the tests notice"
	@echo "make bench     the benchmarks"
	@echo "make clean     remove everything that these made"

demo:
	@$(PYTHON) -m scripts.demo

test: lint test-newest test-oldest

lint:
	@$(call environment,$(NEWEST),dev)
	$(newest) -m ruff check .
	$(newest) -m ruff format --check .
	$(dir $(newest))lint-imports --no-logo --cache-dir .cache/import-linter
	$(newest) -m mypy

format:
	@$(call environment,$(NEWEST),dev)
	$(newest) -m ruff check --fix .
	$(newest) -m ruff format .

unit:
	@$(call environment,$(NEWEST),dev)
	$(FEWER) $(newest) -m pytest tests/unit -n logical --dist worksteal $(PYTEST_ARGS)

test-newest:
	@$(call environment,$(NEWEST),dev)
	$(newest) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-oldest: matrix-$(OLDEST)

matrix: $(VERSIONS:%=matrix-%)

$(VERSIONS:%=matrix-%): matrix-%:
	@$(call environment,$*,test)
	$(FEWER) $(call python,$*) -m pytest -m "unit or every_airflow" $(PARALLEL) $(PYTEST_ARGS)

cluster:
	@$(PYTHON) scripts/environment.py --airflow $(NEWEST) --venv .test/cluster --groups test,cluster
	.test/cluster/bin/python -m pytest tests/cluster -s $(PYTEST_ARGS)

mutation:
	@$(call environment,$(NEWEST),dev)
	$(newest) -m scripts.mutation $(MUTATION_ARGS)

bench:
	@$(call environment,$(NEWEST),dev)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(newest) "$$file" || exit 1; done

clean:
	rm -rf .test .demo .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
