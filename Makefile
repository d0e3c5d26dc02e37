# Everything sets itself up in .venv; PYTHON names the interpreter to make it from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-slow lint bench

help:
	@echo "make demo       train CLIP and MCD on pictures made by code, and name the report (about 10 minutes on two cores)"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow ones"
	@echo "make lint       ruff, mypy and the import rules"
	@echo "make bench      the benchmarks, one after another; DATA=folder for the start-up too"
	@echo "make install    only the environment in .venv; the others do this by themselves"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("coalign needs Python 3.11 or newer; this is %s. Name another: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Installing coalign and its tools in .venv (the first time takes minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# two methods see the same pairs as often, and are compared on the same held-out ones
DEMO := --data scenes:4096 --image-size 32 --batch-size 64 --epochs 16 --evals 3
demo: $(STAMP)
	@$(BIN)/coalign train --recipe clip $(DEMO) --out runs/demo/clip --resume auto
	@$(BIN)/coalign train --recipe mcd $(DEMO) --out runs/demo/mcd --resume auto
	@$(BIN)/coalign compare runs/demo/clip runs/demo/mcd --report runs/demo/compare.html

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@said=$$($(BIN)/lint-imports) || { echo "$$said"; exit 1; }

bench: $(STAMP)
	@$(BIN)/python benchmarks/all.py
	@test -z "$(DATA)" || $(BIN)/python benchmarks/startup.py "$(DATA)"
