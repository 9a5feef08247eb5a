# Two commands: `make demo` and `make test`. Both install all they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test check types style pages install install-dev vllm-venv image clean

demo: $(VENV)/.installed
	$(BIN)/compllm-rag models fetch
	$(BIN)/compllm-rag demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto --dist worksteal --max-worker-restart=0 -m "not network and not gpu and not slow" \
		-rs --cov --cov-report=term:skip-covered --cov-fail-under=85 $(TEST_ARGS)

# Types are checked beside all the rest.
check: $(VENV)/.installed-dev
	$(MAKE) -j2 --output-sync=target types style

types: $(VENV)/.installed-dev
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(MAKE) pages

# The environment variable only keeps the theme from advertising its successor.
pages: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# vLLM's CPU build for the tests, in an environment of its own in the user's cache directory.
vllm-venv: $(VENV)/.installed-dev
	$(BIN)/python -m tests.vllm_environment

# The image of deploy/. Where pip looks for packages may stand in PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
image:
	@docker info >/dev/null 2>&1 || { echo "error: no docker daemon can be used here. Next step: start one, or see docs/guide/deploy.md" >&2; exit 2; }
	docker build -f deploy/Dockerfile -t compllm-rag:0.1.0 --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"error: Python {v[0]}.{v[1]} found, 3.11 to 3.13 expected. Next step: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[dev,train]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) site
