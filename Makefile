# mlcourse: every command a reader needs. `make help` lists them; python3, git and make are all they ask for.
# Safe to interrupt and to repeat: what is finished is not done again, what was cut short is.

TIER ?= tiny
# Notebooks at a time: two on tiny, where processors compute; one where there is a card.
JOBS ?= $(if $(filter tiny,$(TIER)),2,1)
RESUME ?=
LAB_ARGS ?=
UV_MIN := 0.8.0

VENV := $(or $(MLCOURSE_VENV),.venv)
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
# Two processes, each with files of its own, as what a file's tests share is made once; tests/conftest.py orders the files.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.mlcourse-synced

# uv from PATH if it is recent enough, else one of our own in .uv/.
UV := $(shell v=$$(uv --version 2>/dev/null | cut -d' ' -f2); \
	if [ -n "$$v" ] && [ "$$(printf '%s\n' $(UV_MIN) "$$v" | sort -V | head -n 1)" = "$(UV_MIN)" ]; \
	then command -v uv; else echo .uv/bin/uv; fi)

# Void when the folder has moved or its Python is gone.
$(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && $(PYTHON) -c '' 2>/dev/null || rm -f $(STAMP))

export UV_PROJECT_ENVIRONMENT := $(VENV)
export UV_HTTP_TIMEOUT ?= 300
export PATH := $(abspath $(VENV))/bin:$(PATH)
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup gpu hooks browser course course-once docs lab test test-fast test-slow rehearse tidy clean

help:  ## This list
	@echo "Usage: make TARGET [TIER=tiny|12gb|16gb] [JOBS=2] [RESUME=1]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) hooks  ## Install everything into .venv: once, 7 GB on disk, as PyTorch brings CUDA along

# The author's index has the same versions as PyPI, built for CUDA; its own packages only, so nothing else is resolved there.
XLLAMACPP_CUDA := https://xorbitsai.github.io/xllamacpp/whl/cu132

gpu: setup  ## Put llama.cpp's build for CUDA in the place of the one for processors; setup leaves it there
	@version=$$($(PYTHON) -c 'from importlib.metadata import version; print(version("xllamacpp").split("+")[0])'); \
	$(UV) pip install --python $(PYTHON) --no-deps --reinstall --index-url $(XLLAMACPP_CUDA) "xllamacpp==$$version"
	@$(PYTHON) -c 'from mlcourse.doctor import llama_cpp_facts; print("llama.cpp:", *llama_cpp_facts()["cards"] or ["no card"])'

course: setup  ## Run the whole course and print its report card (RESUME=1 goes on where it stopped)
	@$(BIN)/mlcourse run --tier $(TIER) --out _run/$(TIER) --jobs $(JOBS) $(if $(filter-out 0 no,$(RESUME)),--resume)

# The run that `make docs` shows: that of TIER where it was given, else the latest.
REPORTS = _run/$(if $(filter file,$(origin TIER)),*,$(TIER))/report.json

docs: setup course-once  ## Build the site in _docs from the last run; without one, run the course first
	@report=$$(ls -t $(REPORTS) | head -n 1); $(BIN)/mlcourse docs --run-dir "$${report%/*}"

course-once:
	@ls $(REPORTS) >/dev/null 2>&1 || $(MAKE) --no-print-directory course

# MLCOURSE_LAB_IP, which the container sets, is where the lab listens: outside of one, on this machine alone.
lab: setup  ## Open JupyterLab on the course, on this machine only
	@$(BIN)/jupyter lab $${MLCOURSE_LAB_IP:+--ip="$$MLCOURSE_LAB_IP" --no-browser} \
		$$(if [ "$$(id -u)" = 0 ]; then echo --allow-root; fi) $(LAB_ARGS)

test: test-fast browser  ## All tests: the fast ones, the course on tiny, its site in a browser
	@$(MAKE) --no-print-directory course TIER=tiny RESUME=
	@$(MAKE) --no-print-directory test-slow

test-fast: setup  ## Static checks and unit tests, under 2 minutes
	@echo "Static checks and unit tests:"
	@$(PYTEST) -m "not slow and not rehearsal"

test-slow: setup browser  ## Tests of the last run on tiny, its servers and its site, which it builds
	@$(MAKE) --no-print-directory docs TIER=tiny
	@echo "Tests of the course, its servers and its site:"
	@MLCOURSE_SITE=_docs $(PYTEST) -m slow

rehearse: setup  ## Run the lessons' 12 GB column on this processor, with thin models from a hub on this machine
	@$(PYTHON) -m pytest -m rehearsal

tidy: setup  ## Before a commit: clean the notebooks, export the library, write README.md and LICENCES.md
	@$(PYTHON) tests/checks.py --fix
	@$(BIN)/nbdev_export
	@$(PYTHON) -c 'from mlcourse.frontpage import readme; readme()'
	@$(PYTHON) -c 'from mlcourse.licences import write_licences; write_licences()'

clean:  ## Delete what runs and builds made; keeps .venv, downloads and your work/
	@rm -rf _run _docs _stage _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find mlcourse nbs tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp holds the folder it was made for and comes last: an environment without it was cut short, and is made afresh.
# An environment that is only out of date keeps its stamp when uv refuses (no network, say), for then nothing has been changed yet.
$(STAMP): uv.lock pyproject.toml settings.ini setup.py | $(filter .uv/%,$(UV))
	@mkdir -p .make && rm -f .make/stamp
	@if [ -e $@ ]; then mv $@ .make/stamp; else \
		if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi; \
		echo "Setting up in $(VENV), once: up to 4 GB to download, 7 GB on disk (PyTorch comes with CUDA)."; fi
	@$(UV) sync --locked --inexact --extra all --extra dev --compile-bytecode || { code=$$?; \
		if [ $$code -le 128 ] && [ -e .make/stamp ]; then mv .make/stamp $@; fi; \
		echo "The set-up failed; the lines above say why. With that mended, the same command goes on." >&2; exit $$code; }
	@pwd -P > $@ && rm -f .make/stamp

# Fetched beside its place and moved there when whole, so that an interrupted download never passes for uv.
.uv/bin/uv:
	@echo "No uv $(UV_MIN) or newer on PATH; fetching one into .uv/."
	@rm -rf .uv/new && mkdir -p .uv/new .uv/bin
	@cd .uv/new; \
	if python3 -m venv venv >log 2>&1; then venv/bin/python -m pip install --quiet --target got uv >>log 2>&1; \
	elif python3 -m pip --version >>log 2>&1; then python3 -m pip install --quiet --target got uv >>log 2>&1; fi; \
	if [ ! -x got/bin/uv ] && command -v curl >/dev/null; then \
		curl -LsSf https://astral.sh/uv/install.sh 2>>log | UV_UNMANAGED_INSTALL="$$PWD/got/bin" sh >>log 2>&1; fi; \
	if [ ! -x got/bin/uv ]; then tail -n 5 log >&2; \
		echo "uv could not be fetched. Check the network, or install it by hand (https://docs.astral.sh/uv/), then run make again." >&2; \
		exit 1; fi
	@mv .uv/new/got/bin/uv $@ && rm -rf .uv/new

# What nbdev_install_hooks does, for this clone alone: that command would also edit ~/.jupyter and count on an active .venv.
HOOK := [ ! -x "$(BIN)/nbdev_trust" ] || "$(BIN)/nbdev_trust"

hooks: $(STAMP)
	@if [ -z "$$CI" ] && [ "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$$(pwd -P)" ]; then \
		git config --local merge.nbdev-merge.name "merge notebooks cell by cell with nbdev"; \
		git config --local merge.nbdev-merge.driver '"$(BIN)/nbdev_merge" %O %A %B %P'; \
		hook=$$(git rev-parse --git-path hooks)/post-merge; \
		if [ -z "$$(git config core.hooksPath)" ] && [ ! -e "$$hook" ]; then \
			mkdir -p "$${hook%/*}"; \
			printf '#!/bin/sh\n# Trust the notebooks that a pull brought; written by make setup.\n%s\n' '$(HOOK)' > "$$hook"; \
			chmod +x "$$hook"; fi; fi

# The site's tests want a Chromium: the system's, else Playwright's own, else, as root on Debian, apt's. Without one they fail, and say so.
LAUNCH := $(PYTHON) -c 'from playwright.sync_api import sync_playwright as start; \
	p = start().start(); p.chromium.launch(args=["--no-sandbox"]).close(); p.stop()'

browser: setup
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$name >/dev/null; then exit 0; fi; done; \
	if $(LAUNCH) >/dev/null 2>&1; then exit 0; fi; \
	echo "No Chromium on this machine; fetching Playwright's for the site's tests."; \
	if $(PYTHON) -m playwright install chromium >.make/browser.log 2>&1 && $(LAUNCH) >>.make/browser.log 2>&1; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Playwright's did not come or does not start; asking apt."; \
		if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >>.make/browser.log 2>&1; \
		then exit 0; fi; fi; \
	echo "No Chromium could be had (.make/browser.log says why), so the site's tests will fail." >&2; \
	echo "Install Chromium or Chrome, then run make test again." >&2
