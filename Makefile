# The operator's targets. RECIPE picks the recipe, ARGS adds options (ARGS="-o train.steps=50"), BENCH the benchmarks, WORKERS how many
# processes run tests, PYTHON the system's Python, BLD_DEVICE=cpu|gpu the build where the machine should not be looked at.

RECIPE ?= pipeline/recipes/demo.yaml
ARGS ?=
TABLE ?= 1
WORKERS ?= 2
BENCH ?= dump_speed frontier economy shard_speed tokenizers zoo kills forecast
BIN := .venv/bin
STAMP := .venv/bld-stamp
# The first Python that fits and runs: a shim on the PATH may name one that is not installed.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(FITS)' >/dev/null 2>&1 && echo $$p && break; done)
INSTALL = $(or $(PYTHON),$(error no Python 3.11 or 3.12 found: install one, or give PYTHON=/path/to/python3.12)) -m pipeline.setup.install
TABLE_1 := paper_bpe_transfer
TABLE_2 := paper_byte_transfer
TABLE_3 := paper_maths
TASK = $(or $(TABLE_$(TABLE)),$(error TABLE is $(TABLE); give 1, 2 or 3))
PAPER = pipeline/recipes/$(TASK).yaml -o paper -o student.path=runs/$(TASK)/as_published
# Of table 1, a tokenizer that needs no hub.
REHEARSED_1 := -o student.tokenizer=pypi:openai-whisper==20250625/whisper/assets/gpt2.tiktoken
REHEARSED_AT = runs/rehearsal/$(TASK)
REHEARSED = $(PAPER) -o rehearsal $(REHEARSED_$(TABLE)) -o dump.path=$(REHEARSED_AT)/dump -o student.path=$(REHEARSED_AT)/student

define REPRODUCE
	$(BIN)/bld teacher $(1) $(ARGS)
	$(BIN)/bld student $(1) $(ARGS)
	$(BIN)/bld eval $(1) $(ARGS)
endef

.DEFAULT_GOAL := help
.PHONY: help setup teacher student eval report demo test coverage check lock audit bench bench-quality reproduce rehearse

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-15s %s\n", $$1, $$2}'

# Depends on nothing, so it always asks: another BLD_DEVICE or a GPU that was added changes no file.
setup:  ## make .venv with everything in it (a second run does nothing)
	@$(INSTALL)

$(STAMP): pyproject.toml pipeline/setup/install.py $(wildcard pipeline/setup/locks/*.txt)
	@$(INSTALL)

teacher: $(STAMP)  ## stage 1: dump, or resume a dump, of RECIPE
	$(BIN)/bld teacher $(RECIPE) $(ARGS)

student: $(STAMP)  ## stage 2: train, or resume, the student of RECIPE
	$(BIN)/bld student $(RECIPE) $(ARGS)

eval: $(STAMP)  ## bits per byte of RECIPE's start, student and teacher on held-out text
	$(BIN)/bld eval $(RECIPE) $(ARGS)

report: $(STAMP)  ## one HTML page about RECIPE's run
	$(BIN)/bld report $(RECIPE) $(ARGS)

demo: $(STAMP)  ## teacher, student, eval and report on real weights, on a CPU
	$(BIN)/bld teacher $(RECIPE) $(ARGS)
	$(BIN)/bld student $(RECIPE) $(ARGS)
	$(BIN)/bld eval $(RECIPE) $(ARGS)
	$(BIN)/bld report $(RECIPE) $(ARGS)

test: $(STAMP)  ## all tests, WORKERS (2) files at a time; each may take 4 GB
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: $(STAMP)  ## the tests again, and the lines that they do not run; fails where they run less than 90 %
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(STAMP)  ## lint, format, types, and the packages against their locks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pipeline.setup.locks

# Not $(STAMP): an environment of a pyproject.toml that has left the locks cannot be made before they are written.
lock:  ## lock the packages anew after a change of pyproject.toml (ARGS=--upgrade: at their newest)
	@test -x $(BIN)/uv || $(INSTALL)
	$(BIN)/python -m pipeline.setup.locks --write $(ARGS)

audit: $(STAMP)  ## known vulnerabilities of the locked packages; needs PyPI's own data
	$(BIN)/python -m pipeline.setup.locks --audit

bench: $(STAMP)  ## the benchmarks named in BENCH, one after another; hours for all, ARGS goes to each
	set -e; for name in $(BENCH); do $(BIN)/python -m tests.bench.$$name $(ARGS); done

bench-quality: $(STAMP)  ## the students against their controls
	$(BIN)/python -m tests.bench.quality $(ARGS)

reproduce: $(STAMP)  ## the paper's TABLE=1 (to Qwen2's tokenizer), 2 (to bytes) or 3 (maths), trained as it says, beside its figures; needs GPUs and a hub
	$(call REPRODUCE,$(PAPER))

rehearse: $(STAMP)  ## every step of `make reproduce TABLE=1` (2, 3) on a CPU and without a hub: small models, few texts, two steps
	$(call REPRODUCE,$(REHEARSED))
