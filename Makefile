# Targets for the operator. RECIPE selects the recipe, ARGS adds options (ARGS="-o train.steps=50"), BENCH selects the
# benchmarks, WORKERS sets the number of test processes, PYTHON the system's Python; BLD_DEVICE=cpu|gpu overrides device
# detection.

RECIPE ?= pipeline/recipes/demo.yaml
ARGS ?=
TABLE ?= 1
WORKERS ?= 2
BENCH ?= dump_speed frontier economy shard_speed tokenizers zoo kills forecast
BIN := .venv/bin
STAMP := .venv/bld-stamp
# The first suitable Python that runs: a shim on the PATH may name one that is not installed.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(FITS)' >/dev/null 2>&1 && echo $$p && break; done)
NO_PYTHON = no Python 3.11 or 3.12 found: install one, or give PYTHON=/path/to/python3.12
INSTALL = $(or $(PYTHON),$(error $(NO_PYTHON))) -m pipeline.setup.install
TABLE_1 := paper_bpe_transfer
TABLE_2 := paper_byte_transfer
TABLE_3 := paper_maths
TASK = $(or $(TABLE_$(TABLE)),$(error TABLE is $(TABLE); give 1, 2 or 3))
PAPER = pipeline/recipes/$(TASK).yaml -o paper -o student.path=runs/$(TASK)/as_published
# For table 1, a tokenizer that needs no hub.
REHEARSED_1 := -o student.tokenizer=pypi:openai-whisper==20250625/whisper/assets/gpt2.tiktoken
REHEARSED_AT = runs/rehearsal/$(TASK)
REHEARSED_PATHS = -o dump.path=$(REHEARSED_AT)/dump -o student.path=$(REHEARSED_AT)/student
REHEARSED = $(PAPER) -o rehearsal $(REHEARSED_$(TABLE)) $(REHEARSED_PATHS)

define REPRODUCE
	$(BIN)/bld teacher $(1) $(ARGS)
	$(BIN)/bld student $(1) $(ARGS)
	$(BIN)/bld eval $(1) $(ARGS)
endef

.DEFAULT_GOAL := help
.PHONY: help setup teacher student eval report demo test coverage check lock audit
.PHONY: bench bench-quality bench-methods results reproduce rehearse

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-15s %s\n", $$1, $$2}'

# No prerequisites, so it always runs: a different BLD_DEVICE or a new GPU changes no file.
setup:  ## create .venv with everything in it (a second run does nothing)
	@$(INSTALL)

$(STAMP): pyproject.toml pipeline/setup/install.py $(wildcard pipeline/setup/locks/*.txt)
	@$(INSTALL)

teacher: $(STAMP)  ## stage 1: start or resume the dump of RECIPE
	$(BIN)/bld teacher $(RECIPE) $(ARGS)

student: $(STAMP)  ## stage 2: start or resume training the student of RECIPE
	$(BIN)/bld student $(RECIPE) $(ARGS)

eval: $(STAMP)  ## bits per byte of RECIPE's start, student and teacher on held-out text
	$(BIN)/bld eval $(RECIPE) $(ARGS)

report: $(STAMP)  ## one HTML page on RECIPE's run
	$(BIN)/bld report $(RECIPE) $(ARGS)

demo: $(STAMP)  ## teacher, student, eval and report on real weights, on a CPU
	$(BIN)/bld teacher $(RECIPE) $(ARGS)
	$(BIN)/bld student $(RECIPE) $(ARGS)
	$(BIN)/bld eval $(RECIPE) $(ARGS)
	$(BIN)/bld report $(RECIPE) $(ARGS)

test: $(STAMP)  ## all tests, WORKERS (2) files at a time; each may use 4 GB
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: $(STAMP)  ## all tests, and the lines that they do not cover; fails below 90 % coverage
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(STAMP)  ## lint, format, types, and the installed packages against their locks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pipeline.setup.locks

# Not $(STAMP): if pyproject.toml no longer fits the locks, the environment cannot be made before they are written.
lock:  ## lock the packages again after a change of pyproject.toml (ARGS=--upgrade: the newest versions)
	@test -x $(BIN)/uv || $(INSTALL)
	$(BIN)/python -m pipeline.setup.locks --write $(ARGS)

audit: $(STAMP)  ## known vulnerabilities of the locked packages; needs data from PyPI itself
	$(BIN)/python -m pipeline.setup.locks --audit

bench: $(STAMP)  ## the benchmarks named in BENCH, in turn; all take hours, ARGS is passed to each
	set -e; for name in $(BENCH); do $(BIN)/python -m tests.bench.$$name $(ARGS); done

bench-quality: $(STAMP)  ## students compared with their controls
	$(BIN)/python -m tests.bench.quality $(ARGS)

bench-methods: $(STAMP)  ## every method from one dump, each at its best settings (ARGS="--pair mistral"); takes hours
	$(BIN)/python -m tests.bench.methods $(ARGS)

results: $(STAMP)  ## write tests/bench/results/*.json into the tables of the pages
	$(BIN)/python -m tests.bench.pages

reproduce: $(STAMP)  ## the paper's TABLE=1 (Qwen2's tokenizer), 2 (bytes) or 3 (maths); needs GPUs and a hub
	$(call REPRODUCE,$(PAPER))

rehearse: $(STAMP)  ## every step of `make reproduce TABLE=1` (2, 3) on a CPU without a hub: small models, few texts
	$(call REPRODUCE,$(REHEARSED))
