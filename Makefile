# The operator's targets. RECIPE picks the recipe, ARGS adds options (ARGS="-o train.steps=50"), BENCH the benchmarks, PYTHON the
# system's Python, BLD_DEVICE=cpu|gpu the build where the machine should not be looked at.

RECIPE ?= pipeline/recipes/demo.yaml
ARGS ?=
TABLE ?= 1
BENCH ?= dump_speed frontier economy shard_speed tokenizers kills forecast
BIN := .venv/bin
STAMP := .venv/bld-stamp.json
# The first Python that fits and runs: a shim on the PATH may name one that is not installed.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(FITS)' >/dev/null 2>&1 && echo $$p && break; done)
INSTALL = $(or $(PYTHON),$(error no Python 3.11 or 3.12 found: install one, or give PYTHON=/path/to/python3.12)) -m pipeline.install
TABLE_1 := paper_bpe_transfer
TABLE_2 := paper_byte_transfer
TABLE_3 := paper_maths
PAPER = pipeline/recipes/$(TABLE_$(TABLE)).yaml -o paper -o student.path=runs/$(TABLE_$(TABLE))/as_published $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup teacher student eval report demo test coverage check bench bench-quality reproduce

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-15s %s\n", $$1, $$2}'

# Depends on nothing, so it always asks: another BLD_DEVICE or a GPU that was added changes no file.
setup:  ## make .venv with everything in it (a second run does nothing)
	@$(INSTALL)

$(STAMP): pyproject.toml pipeline/install.py
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

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(ARGS)

coverage: $(STAMP)  ## the tests again, and which lines they do not run; fails below 90 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks named in BENCH, one after another; hours for all, ARGS goes to each
	set -e; for name in $(BENCH); do $(BIN)/python -m tests.bench.$$name $(ARGS); done

bench-quality: $(STAMP)  ## the students against their controls
	$(BIN)/python -m tests.bench.quality $(ARGS)

reproduce: $(STAMP)  ## the paper's TABLE=1 (to Qwen2's tokenizer), 2 (to bytes) or 3 (maths), trained as it says, beside its figures; needs GPUs and a hub
	@test -n "$(TABLE_$(TABLE))" || { echo "TABLE is $(TABLE); give 1, 2 or 3" >&2; exit 1; }
	$(BIN)/bld teacher $(PAPER)
	$(BIN)/bld student $(PAPER)
	$(BIN)/bld eval $(PAPER)
