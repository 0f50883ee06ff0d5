# sat_lib: `make reproduce` is the whole way from a fresh checkout to the figures. `make` lists the rest.

PROFILE ?= smoke
# The first interpreter that really starts (a pyenv shim may not) and is a Python 3.11 to 3.13.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IN_RANGE)' 2>/dev/null && echo $$p && break; done)

VENV := .venv/bin/python
TORCH = $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
CPU_WHEELS := --no-deps --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu
READY = $(shell cksum < pyproject.toml) in $(CURDIR)
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
OUTPUT_KEYS := metadata.papermill cell.metadata.papermill metadata.widgets metadata.language_info.version

.PHONY: help setup install reproduce figures test browsertest gputest lint lab clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

setup:  ## install the pinned environment into .venv, unless it is there (1.5 to 4 minutes)
	@[ "$$(cat .venv/.ready 2>&1)" = "$(READY)" ] && $(VENV) -c "" || $(MAKE) --no-print-directory install

install:
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(IN_RANGE)' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed$(if $(PYTHON), and $(PYTHON) isn't one,; none was found)."; \
		echo "Install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name it:"; \
		echo "    make setup PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its venv package is missing. On Debian and Ubuntu:"; \
		$(PYTHON) -c 'import sys; print("    sudo apt install python%d.%d-venv" % sys.version_info[:2])'; exit 1; }
	@echo "[1/3] virtual environment .venv with $$($(PYTHON) --version)"
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "[2/3] $(TORCH) for the GPU, several GB"; $(VENV) -m pip install -q $(TORCH); \
	else \
		echo "[2/3] $(TORCH) for the CPU, about 200 MB (should pip warn that it can't reach download.pytorch.org,"; \
		echo "      it goes on with its usual index, which may hold the CUDA build of several GB)"; \
		$(VENV) -m pip install -q $(CPU_WHEELS) $(TORCH); fi
	@echo "[3/3] the other packages, about 2 minutes"
	@$(VENV) -m pip install -qq -e ".[pinned]"
	@echo "$(READY)" > .venv/.ready
	@echo "environment ready"

reproduce: setup  ## run the notebooks that changed, to figures/smoke; PROFILE=paper for the published set-up
	@$(VENV) -m sat_lib reproduce --profile $(PROFILE)

figures: setup  ## redraw figures/paper from the committed rows, those that changed; no GPU (2 minutes)
	@$(VENV) -m sat_lib reproduce --profile paper --figures-only

test: setup  ## run the tests
	@$(VENV) -m pytest

browsertest: setup  ## click the explorer in a real JupyterLab; needs Chromium, installs playwright into .venv
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
		command -v "$$name" >/dev/null 2>&1 && exit 0; done; \
		echo "no Chromium found. Install it (Debian, Ubuntu: sudo apt install chromium), or name it in CHROMIUM"; exit 1
	@$(VENV) -m pip install -qq -e ".[browser]"
	@$(VENV) -m pytest tests/explorer/test_lab.py

gputest: setup  ## run the GPU tests, and every kernel under compute-sanitizer; appends to data/results/gpu_tests.jsonl
	@$(VENV) tests/gpu_summary.py

lint: setup  ## check the style of code and notebooks, and that notebooks carry no output
	@$(VENV) -m ruff check sat_lib tests notebooks
	@$(VENV) -m ruff format --check -q sat_lib tests notebooks
	@.venv/bin/lint-imports --no-cache --no-logo
	@$(if $(NOTEBOOKS),$(VENV) -m nbstripout --verify --keep-id --extra-keys "$(OUTPUT_KEYS)" $(NOTEBOOKS))

lab: setup  ## open the notebooks in JupyterLab
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV) -m jupyterlab notebooks

clean:  ## remove runs and the smoke figures; downloaded data stay
	@rm -rf runs figures/smoke
	@echo "removed runs/ and figures/smoke/; kept .venv, figures/paper/ and the data caches in data/cache/"
