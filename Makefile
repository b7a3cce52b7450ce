# `make help` says what there is. Two commands matter: `make serve` and `make test`.

PORT   ?= 8000
SHARDS ?= 1
MODE   ?= mac
MODEL  ?=
STORE  ?=
VENV   ?= .venv
# Extra arguments of pytest: make test PYTEST_ARGS="tests/storage -x"
PYTEST_ARGS ?=
# Where else pip may look for torch, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

PYTHON ?= $(or $(shell command -v python3.11 2>/dev/null),$(shell command -v python3 2>/dev/null),python3)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"torch==\([^"+]*\)".*/\1/p' pyproject.toml)
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")

.DEFAULT_GOAL := help
.PHONY: help install install-dev serve test check format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables, with what holds now:"
	@echo "    PORT=$(PORT) SHARDS=$(SHARDS) MODE=$(MODE) VENV=$(VENV)"
	@echo "    MODEL=$(or $(MODEL),(the small model that ships with titanmem))"
	@echo "    STORE=$(or $(STORE),(file:// under ./var))"

install: $(VENV)/.installed  ## make the environment .venv and install titanmem into it

install-dev: $(VENV)/.installed-dev  ## the same with what the tests need

serve: install  ## start Ray and the server on this machine; Ctrl-C drains and stops
	@exec $(BIN)/titanmem serve --port "$(PORT)" --shards "$(SHARDS)" --mode "$(MODE)" \
		$(if $(MODEL),--model "$(MODEL)") $(if $(STORE),--store "$(STORE)")

test: check  ## the checks and the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: install-dev  ## ruff, pyright and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/tidy

format: install-dev  ## let ruff lay out the code and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the tools left; the environment and ./var stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# An environment that broke half-way (Debian without python3-venv) is removed again, so that the next try starts clean.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "titanmem needs Python 3.11, and '$(PYTHON)' is not one: install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || { test -x "$(BIN)/pip" || rm -rf "$(VENV)"; \
		echo "could not make $(VENV): on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }

# torch goes first and alone: without an NVIDIA driver its CPU build is taken wherever pip finds one, since the
# default build brings gigabytes of CUDA libraries. The stamp is written last, so a broken install is done again.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@build=; if test ! -e /proc/driver/nvidia/version \
		&& $(PIP) install --quiet --dry-run --no-deps $(PIP_INDEX) "torch==$(TORCH)+cpu" >/dev/null 2>&1; \
	then build=+cpu; fi; \
	echo "installing torch $(TORCH)$$build into $(VENV)"; \
	$(PIP) install --quiet $(PIP_INDEX) "torch==$(TORCH)$$build"
	@echo "installing titanmem into $(VENV): a few minutes the first time"
	@$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) install --quiet --editable ".[dev]"
	@touch $@
