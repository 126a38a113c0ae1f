# Everything starts from a bare Python 3.11 to 3.13; `make install` makes .venv, the other targets depend on it.
PYTHON ?= python3
# A version for which the package index has a wheel here; any torch >= 2.11 does.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)
STAMP := $(VENV)/.installed
# Two test processes with one thread each are faster on two cores than one with two.
JOBS ?= 2

.PHONY: install demo test test-all check format tables gpu-test gpu-bench clean

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "hatchling>=1.25" "editables>=0.5"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]" $(foreach plugin,$(PLUGINS),-e $(plugin)) -e examples/third_party_plugin
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out demo-out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

tables: $(STAMP)
	$(BIN)/python docs/tables.py

# On a machine with a card: correctness of everything that runs there.
gpu-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu plugins/qhub-triton/tests

# On a machine with a card: its own docs/performance.md, in gpu-bench. Peers that are installed take part.
gpu-bench: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.grid --out gpu-bench/gpu_grid.json --rows all --warm 8
	$(BIN)/python -m benchmarks.gpu.end_to_end --out gpu-bench/gpu_end_to_end.json
	$(BIN)/python -m benchmarks.gpu.generate --out gpu-bench/gpu_generate.json
	$(BIN)/python -m benchmarks.gpu.host --out gpu-bench/gpu_host.json
	$(BIN)/python -m benchmarks.gpu.reading --out gpu-bench/gpu_reading.json
	$(BIN)/python -m benchmarks.gpu.experts --out gpu-bench/gpu_experts.json
	$(BIN)/python -m benchmarks.gpu.report --results gpu-bench --docs gpu-bench

clean:
	rm -rf $(VENV) demo-out gpu-bench
