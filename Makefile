# DeepStack Lens: what to type. `make help` lists it.
# Needs Python 3.11 or newer, git and make; everything else goes into .venv.

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check $(if $(CI),--quiet)
JOBS ?= 2
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help run test fast lint format examples clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo '  for example: make run ARGS="--port 7861 --model Qwen/Qwen3-VL-2B-Instruct"'

run: $(VENV)/installed-run ## the page, on 127.0.0.1:7860 with the embedded model (ARGS="..." for options)
	@$(PY) -m app $(ARGS)

test: lint chromium ## lint and all tests, the browser tests included
	$(PYTEST) $(ARGS)

fast: lint ## lint and all tests but those that drive a browser or are slow
	$(PYTEST) -m "not browser and not slow" $(ARGS)

lint: $(VENV)/installed-test ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/installed-test ## ruff, changing the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

examples: $(VENV)/installed-run ## draws assets/examples again
	$(PY) -m assets.examples.make

clean: ## removes .venv and what tests left behind
	rm -rf $(VENV) .pytest_cache .ruff_cache tests/browser/failures
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Chromium for the browser tests: one that is there, else Debian's package, else Playwright's own, else an error.
.PHONY: chromium
chromium: $(VENV)/installed-test
	@$(PY) -m tests.browser.chromium --install

# The stamps: pip is asked again only when the pinned files have changed.
$(VENV)/installed-run: requirements.txt | $(PY)
	@echo "Installing requirements.txt into $(VENV) (a few minutes the first time)"
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/installed-test: requirements-dev.txt requirements.txt | $(PY)
	@echo "Installing requirements-dev.txt into $(VENV) (a few minutes the first time)"
	$(PIP) install -r requirements-dev.txt
	@touch $(VENV)/installed-run $@

# The first Python that is new enough and can make virtual environments. PYTHON=... is tried before all others.
$(PY):
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Making $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) && exit 0; \
	        rm -f $@; echo "error: $$python could not make the virtual environment $(VENV): see the lines above" >&2; exit 1; \
	    fi; \
	done; \
	echo "error: no Python 3.11 or newer with the modules venv and ensurepip was found" \
	     "(tried: $(PYTHON) python3 python3.13 python3.12 python3.11 python)." >&2; \
	echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	exit 1
