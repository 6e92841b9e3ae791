# Two commands on a fresh machine: `make demo` and `make test`. The environment in .venv sets itself up.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
DATA ?=

.PHONY: demo test

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: .venv/ready
	$(BIN)/omnilatent demo $(if $(DATA),--data "$(DATA)")

# two files at a time, each on one core: most tests are too small for more
test: export OMP_NUM_THREADS = 1
test: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile
