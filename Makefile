PYTHON   ?= python3
PROFILE  ?= mini
CHAPTERS ?=
FRESH    ?=
JOBS     ?= 2
PYTEST   ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install reproduce book test browser lint lock clean distclean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make reproduce CHAPTERS="02 03"    only some chapters (default: all)'
	@echo '  make reproduce FRESH=1             every run made anew and compared with those that ship'
	@echo '  make reproduce PROFILE=full        real CLIP and real data, on a GPU (default: mini)'
	@echo '  make test PYTEST="-k coop"         more arguments for pytest'

install: $(STAMP)  ## install the pinned environment into .venv

# What ships with the package is of the profile mini, so that is what is audited.
reproduce: $(STAMP)  ## run the chapters anew, in place, audit the evidence, render the book
	$(BIN)/promptkit reproduce --profile $(PROFILE) --chapters "$(CHAPTERS)" --workers $(JOBS) \
		$(if $(FRESH),--fresh)
	$(if $(and $(filter mini,$(PROFILE)),$(wildcard promptkit/assets/evidence/*.csv)),$(BIN)/promptkit evidence audit --workers $(JOBS) --sample 10 --minutes 3)
	$(MAKE) book

book: $(STAMP)  ## render the committed notebooks without running them
	$(BIN)/jupyter-book build --all -W -n --keep-going .
	@echo "Open _build/html/index.html"

test: $(STAMP) browser  ## run every test
	$(BIN)/pytest -n $(JOBS) $(PYTEST)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock:  ## resolve pyproject.toml afresh and rewrite requirements.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install '.[all]'
	@echo '# Every package of the environment, pinned; `make lock` writes this file anew from pyproject.toml.' > requirements.lock
	build/lock/bin/pip freeze --all --exclude promptkit --exclude pip \
		| sed -E '/^(nvidia-|cuda-|triton)/ s/$$/ ; sys_platform == "linux"/' >> requirements.lock

clean:  ## remove what was built
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV)

# setuptools is in the lock, so the package itself builds without fetching anything more.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11.5 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11, 5) else None'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(BIN)/pip install --requirement requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	@touch $@

# The book is tested in a real browser. Debian's is installed where that can be done without asking;
# anywhere else those tests say that they are skipped, or fail if CI is set.
browser:
	@if command -v chromedriver > /dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo 'Installing Chromium for the tests of the book'; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; } \
			> /dev/null 2>&1 || echo 'Chromium could not be installed'; \
	fi
