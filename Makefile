# Everything starts here; `make help` says what there is. Steps that were done aren't done again.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTHON_SOURCES := $(shell find src -name '*.py' -o -name '*.pyi')
RUST_SOURCES := $(shell find crates fuzz/differential fuzz/harness -name '*.rs' -o -name Cargo.toml -o -name '*.S' -o -name '*.bin') \
	Cargo.toml Cargo.lock

.DEFAULT_GOAL := help
.PHONY: help demo build test test-rust test-python lint format bench fuzz soak wheel clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-12s %s\n' "$$name" "$$what"; done

demo: build ## Run a command in a machine on this very host, with the best engine it has
	$(PYTHON) tools/host_packages.py demo
	$(RUN) tools/demo.py

build: $(VENV)/.built ## Build everything; the command is .venv/bin/ringfence afterwards

test: test-rust test-python ## Run the whole suite

test-rust: $(VENV)/.tools
	$(PYTHON) tools/host_packages.py build test
	cargo test --locked --workspace --quiet --no-fail-fast

test-python: build wheel
	$(PYTHON) tools/host_packages.py build test
	$(RUN) -m pytest

lint: build ## Check formats, types and style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	cargo fmt --all --check
	$(RUN) -m mypy
	$(RUN) -m mypy.stubtest ringfence._native --allowlist tools/stubtest-allowlist.txt
	cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
	cargo tree --locked --quiet --depth 0 --manifest-path fuzz/libfuzzer/Cargo.toml
	$(RUN) -m pytest -q tests/style

format: $(VENV)/.tools ## Format what lint checks, and list the documents
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	cargo fmt --all
	$(RUN) tools/docs_index.py

bench: build ## Measure against peers; results go to benchmarks/results
	$(PYTHON) tools/host_packages.py bench
	$(RUN) -m benchmarks run --quick

fuzz: $(VENV)/.tools ## Fuzz every surface for a bounded time
	$(RUN) tools/fuzz.py

soak: build ## Run the long tests
	$(PYTHON) tools/host_packages.py build test soak
	$(RUN) -m pytest tests/soak

wheel: dist/.made ## Build the wheel that carries the binaries, into dist/

clean: ## Remove what was built and cached here
	rm -rf $(VENV) target dist build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf src/ringfence/_bin src/ringfence/_native*.so benchmarks/results

# The environment with the development tools; again when their list changes.
$(VENV)/.tools: pyproject.toml tools/constraints.txt
	$(PYTHON) tools/host_packages.py build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or later is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade 'pip>=25.1'
	$(RUN) -m pip install --quiet --constraint tools/constraints.txt --group dev
	touch $@

$(VENV)/.built: $(VENV)/.tools $(RUST_SOURCES) tools/build_binaries.py
	$(PYTHON) tools/build_binaries.py
	$(VENV)/bin/maturin develop --quiet --release --locked
	touch $@

dist/.made: $(VENV)/.built $(PYTHON_SOURCES)
	rm -rf dist
	$(VENV)/bin/maturin build --quiet --release --locked --out dist
	touch $@
