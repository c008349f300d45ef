# pardemo: every target works on a fresh clone; only python3.11+ with venv, and make, are assumed.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3; do command -v python$$v >/dev/null 2>&1 && python$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v python$$v && break; done)
VENV := .venv
BIN := $(VENV)/bin
# what to install beside the package: dev for the tests, e2e for those in a browser
EXTRAS ?= dev
# how many processes share the tests, many of which wait: make test WORKERS=2; 0 is one after another
WORKERS ?= 0
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: setup lab bench test soak lint notebooks site clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "pardemo needs python 3.11 or newer on the PATH"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

lab: setup
	$(BIN)/python -m pardemo lab

bench: setup
	$(BIN)/python -m pardemo bench strategies

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

# every fault many times over, every lesson in the browser: hours on a small machine
soak: setup
	$(BIN)/python -m pytest -m "soak or not soak"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check pardemo tests
	$(BIN)/mypy

notebooks: setup
	$(BIN)/python -m pardemo notebooks

# the course as static pages in build/site, offline, from the committed outputs
site: EXTRAS = dev,site
site:
	$(MAKE) setup EXTRAS=$(EXTRAS)
	$(BIN)/python -m pardemo.site

clean:
	rm -rf $(VENV) results build *.egg-info
