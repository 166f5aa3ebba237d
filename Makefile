# Two set-up commands, each complete on a fresh machine with Python 3.11+ and git:
#   make quickstart   trains, merges and questions a tiny language model on this machine's CPU
#   make test         runs every test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/quickstart/run.py

test: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" scripts/test

check: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check

format: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" scripts/format

clean:
	rm -rf $(VENV) outputs quickstart-out last_run_prepared
