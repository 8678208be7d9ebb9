# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
TORCH_BACKEND ?= cpu
VENV := .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

# Each worker reads what it is given, so it is given no module without a slow test.
SLOW_MODULES = $(shell grep -rl 'pytest.mark.slow' tests --include='test_*.py')
DIRECTIONS := isruc_eeg2ecg isruc_ecg2eeg wesad_ppg2ecg wesad_ecg2ppg fog_eeg2emg fog_emg2eeg wesad_ppg2ecg_ecgfm

.PHONY: help install demo test test-slow consortium directions lint types format benchmarks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt tools/install_torch.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python tools/install_torch.py constraints.txt $(TORCH_BACKEND)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[simulation,dev]'
	@touch $@

install: $(VENV)/.installed  ## create .venv and install fedbridge with its tools (GPU: TORCH_BACKEND=auto)

demo: install  ## the main job on the built-in cohort; ends by naming its report
	$(BIN)/fedbridge-sim run configs/demo.yaml --out runs/demo --overwrite

test: install  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: install  ## real processes, kills, Flower's own engine, full-size networks
	$(BIN)/python -m pytest -m slow -n 5 --dist loadfile --no-loadscope-reorder --timeout 1500 $(SLOW_MODULES)

consortium: install  ## nginx, SuperLink and three hospitals on this machine run two studies (needs nginx)
	$(BIN)/python -m pytest -m slow -s -v tests/deployment/test_consortium.py

directions: install  ## the published directions in small: made-up recordings, filled weights, figures that mean nothing
	rm -rf runs/directions
	for name in $(DIRECTIONS); do \
	  $(BIN)/fedbridge-sim made-up configs/$$name.yaml --out runs/directions/$$name/made-up && \
	  $(BIN)/fedbridge-sim run runs/directions/$$name/made-up/config.yaml --out runs/directions/$$name/run || exit 1; \
	done

lint: install  ## ruff, as pre-commit runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy strict on the four packages
	$(BIN)/mypy

format: install  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: install  ## each prints a ratio against a named baseline (private_selection: an hour, by itself)
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.private_step
	$(BIN)/python -m benchmarks.ledger
	$(BIN)/python -m benchmarks.published --windows 16

clean:  ## remove what was made here (not the user's cache folder)
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
