# Kon-Agent: `make` lists what can be made. Needs a Debian-like machine with Python 3.11 or newer; `make test` as root
# installs the Debian packages it misses.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
TOOLS := clang llvm-strip clang-format ip tc ping strace
PACKAGES := clang llvm clang-format iproute2 libbpf1 iputils-ping strace
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup run test fault check format lint types unit tools bpf bpf-check proto bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s'|'

setup: $(VENV)/.installed ## make the virtual environment and install the agent and the receiver into it

run: setup ## start a receiver and an agent, show records arriving; Ctrl-C stops both
	$(BIN)/kon-agent demo

test: $(VENV)/.installed-dev tools bpf-check ## run the whole suite; as root, the tests that need root too
	$(PYTEST)

fault: $(VENV)/.installed-dev tools ## run the long fault matrix and print its table
	KON_FAULT_LONG=1 $(PYTEST) -q -s tests/fault

check: $(VENV)/.installed-dev ## format, lint, types, unit and property tests: about a minute
	$(BIN)/ruff format --check --quiet kon_agent tests
	$(BIN)/ruff check --quiet kon_agent tests
	$(BIN)/mypy --no-error-summary
	$(PYTEST) -q tests/unit tests/property

format: $(VENV)/.installed-dev ## format Python and C
	$(BIN)/ruff format --quiet kon_agent tests
	$(BIN)/ruff check --fix --quiet kon_agent tests
	$(MAKE) -C ebpf format

bpf: ## compile the BPF objects (clang)
	$(MAKE) -C ebpf all

bpf-check: ## compare the committed BPF objects with their sources
	@if command -v clang >/dev/null; then $(MAKE) --no-print-directory -C ebpf check; \
	elif [ -n "$$CI" ]; then echo "clang is missing" >&2; exit 1; \
	else echo "no clang: the BPF object is not compared with its source"; fi

proto: $(VENV)/.installed-dev ## generate the protobuf code
	$(BIN)/python -m grpc_tools.protoc -Iprotocol --python_out=kon_agent/wire --pyi_out=kon_agent/wire protocol/kon_agent.proto

bench: $(VENV)/.installed-dev ## measure, as ratios beside something else
	$(BIN)/python -m tests.bench.tap
	$(BIN)/python -m tests.bench.storm
	$(BIN)/python -m tests.bench.packet_cost
	$(BIN)/python -m tests.bench.probe_cost

tools: # what the tests call besides Python; installed where we may, else their tests are skipped
	@missing=$$(for tool in $(TOOLS); do command -v $$tool >/dev/null || echo $$tool; done); \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing what is missing: $$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(PACKAGES) >/dev/null; \
	elif [ -n "$$missing" ]; then echo "missing, their tests are skipped: $$missing"; fi

clean: ## remove what was made here
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: apt-get install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; } \
		|| { echo "Python's venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install --only-binary :all: --require-hashes -r requirements.lock
	$(PIP) install --no-deps --editable .
	@# A worker compiles nothing: what is not compiled here costs each of them memory and time at every start.
	@$(BIN)/python -m compileall -q kon_agent
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(PIP) install --only-binary :all: --require-hashes -r requirements-dev.lock
	@touch $@
