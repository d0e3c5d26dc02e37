# Targets set up .venv if needed; PYTHON is the interpreter to create it with.
PYTHON ?= python3
# processes of `make test`, single-threaded each
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_STAMP := .venv/.installed-demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-slow test-open-clip lint docs bench

help:
	@echo "make demo       train CLIP and MCD on emoji, and compare them in runs/demo/index.html (some minutes on two cores)"
	@echo "make test       run the tests, except the slow ones"
	@echo "make test-slow  run the slow tests"
	@echo "make test-open-clip OPEN_CLIP=folder  run the tests of towers, imports and exports with another version of open_clip"
	@echo "make lint       check style, types, the import rules and the wording"
	@echo "make docs       build the documentation site into site/"
	@echo "make bench      run the benchmarks, one after another; DATA=folder adds the start-up benchmark"
	@echo "make install    set up .venv; all other targets do so if needed"

install: $(STAMP)

define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("coalign needs Python 3.11 or newer, but this is %s. Choose another one: make PYTHON=python3.12" % sys.version.split()[0])'
endef

$(STAMP): pyproject.toml
	@$(CHECK_PYTHON)
	@echo "Installing coalign and its development tools in .venv (takes minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# the demo needs less than development; what is installed already is kept
demo: $(DEMO_STAMP)
	@$(BIN)/coalign demo

$(DEMO_STAMP): pyproject.toml
	@$(CHECK_PYTHON)
	@echo "Installing coalign, the emoji and a small pretrained image encoder in .venv (takes minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# OPEN_CLIP is a checkout of open_clip, such as its main branch
OPEN_CLIP_TESTS := networks training/test_sharding.py test_gradient_checkpointing.py data/text/test_tokenizer.py
OPEN_CLIP_TESTS += methods/test_clip.py workflows/models workflows/evaluate/test_eval_model.py
test-open-clip: $(STAMP)
	@test -d "$(OPEN_CLIP)/src/open_clip" || { echo "OPEN_CLIP=$(OPEN_CLIP) is not a checkout of open_clip."; exit 1; }
	@PYTHONPATH="$(abspath $(OPEN_CLIP))/src" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(addprefix tests/,$(OPEN_CLIP_TESTS))

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@output=$$($(BIN)/lint-imports) || { echo "$$output"; exit 1; }
	@$(BIN)/python scripts/lint_words.py

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is the documentation; $(BIN)/python -m http.server -d site also serves its search."

bench: $(STAMP)
	@$(BIN)/python benchmarks/all.py
	@test -z "$(DATA)" || $(BIN)/python benchmarks/startup.py "$(DATA)"
