# make demo | test | oldest | fuzz | lint | docs | dist | setup: each works from a fresh clone and makes .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/triton-3.6.0
OLDEST_PYTHON ?= python3.12
OLDEST_VENV := .venv-oldest

.PHONY: emulate setup demo test oldest fuzz lint docs dist gpu clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/cpu/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {v[0]}.{v[1]} found; say make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/uniflow demo --out out/demo --force

# the oldest Triton that is supported, beside the newest, for tests/compile
$(OLDEST): | $(READY)
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# bytecode is kept, else each of its processes would make asserts into what pytest runs anew
test: $(READY) $(OLDEST)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not gpu"

# what hypothesis makes up, for minutes in place of the second that it has in `make test`; other examples in each run
fuzz: $(READY)
	$(BIN)/python -m pytest -n auto -m "hypothesis and not gpu" --hypothesis-profile fuzz

# the same tests on the oldest torch that is promised, with the Triton of its time; 5 GB, since torch comes with CUDA
oldest:
	test -x $(OLDEST_VENV)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	UNIFLOW_CUDA=0 PYTHONWARNINGS=ignore $(OLDEST_VENV)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	$(OLDEST_VENV)/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not gpu"

# what the compilers made, executed on the CPU: its tests, and counts for docs/kernels.md
emulate: $(READY)
	for target in 80 90 csrc80 csrc90; do $(BIN)/python -m pytest -q tests/ptx --emulate $$target || exit 1; done
	$(BIN)/python -m tests.ptx.count
	$(BIN)/python -m benchmarks report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# README.md, docs/ and every public name's docstring as pages in out/site; a warning, as of a link that leads nowhere, is an error
docs: $(READY)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# source distribution and wheel in dist/, tried where nothing of this folder is
dist: $(READY)
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/dist

# takes what is there: nothing is installed, and a machine lent for minutes has no .venv. CASES=a,b runs a part
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks gpu $(if $(CASES),--cases $(CASES))

clean:
	rm -rf $(VENV) $(OLDEST_VENV) out build dist *.egg-info .hypothesis
