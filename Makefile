# One script for people and CI. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# What a target needs is installed once; a change of the versions installs again.
QUICKSTART := $(VENV)/.installed-quickstart
DEV := $(VENV)/.installed-dev
# -qq hides warnings, not errors.
INSTALL := $(VENV)/bin/pip install -qq --constraint constraints.txt

SCENES := runs/scenes

.PHONY: help quickstart test test-lowest test-faults test-browser gpu check docs wheel release notebooks options clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Everything is installed into $(VENV) (choose with VENV=...), with $(PYTHON) (choose with PYTHON=...)."

quickstart: $(QUICKSTART)  ## train a small CLIP on synthetic scenes, in minutes, on a CPU
	$(VENV)/bin/clip-lightning fit --config quickstart --data.root scenes:$(SCENES)
	@run=$$(ls -dt runs/2*/ | head -n 1); printf '%s\n' '' \
	  "What the model finds:   $${run}predictions.html (open it in a browser)" \
	  'Activate it first:      . $(VENV)/bin/activate' \
	  'Then search the images, classify one, or open the search page:' \
	  "  clip-lightning index $${run}model $(SCENES) --out quickstart-index" \
	  '  clip-lightning search quickstart-index "a large red circle left of a small blue square"' \
	  "  clip-lightning classify $${run}model $(SCENES)/00000.jpg --labels 'a triangle,a square,a star'" \
	  '  clip-lightning app quickstart-index --open' \
	  'Train on your own images: clip-lightning fit --config heads --data.root path/to/folder'

test: $(DEV)  ## run the tests (PYTEST_ARGS="-k losses" chooses among them)
	$(VENV)/bin/pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

test-faults: $(DEV)  ## run the tests that break things, for more than an hour
	$(VENV)/bin/pytest -m faults $(PYTEST_ARGS)

test-browser: $(DEV)  ## run the tests that need Chromium
	@$(INSTALL) --editable ".[dev,browser]"
	$(VENV)/bin/pytest -m browser $(PYTEST_ARGS)

test-lowest:  ## run some tests with the lowest versions that pyproject.toml promises, in an environment of their own
	@$(PYTHON) -m venv $(VENV)-lowest
	@$(VENV)-lowest/bin/pip install -qq --constraint constraints-lowest.txt --editable ".[dev]"
	$(VENV)-lowest/bin/pytest --numprocesses logical --maxprocesses 4 --dist loadfile -o filterwarnings=default \
	  -m "not slow and not faults and not browser" tests/training tests/model tests/tracking $(PYTEST_ARGS)

gpu: $(DEV)  ## check and time training on this machine's GPU, in about half an hour
	PATH=$(VENV)/bin:$$PATH benchmarks/gpu.sh

check: $(DEV)  ## lint, formatting, types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict --follow-imports=silent examples/library.py

docs: $(DEV)  ## build the documentation site into site/; warnings and dead links are errors
	@$(INSTALL) --editable ".[dev,docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

wheel: $(DEV)  ## build wheel and sdist, and try the wheel in an empty environment outside the tree
	rm -rf dist && $(VENV)/bin/python -m build
	trial=$$(mktemp -d) && wheel=$$(ls $(CURDIR)/dist/*.whl) && PYTHON=$(PYTHON) docker/install.sh $$trial/venv "$$wheel" \
	  && cd $$trial && export HOME=$$trial WANDB_MODE=offline PATH=$$trial/venv/bin:$$PATH \
	  && clip-lightning fit --config quickstart --data.root scenes:$$trial/scenes --trainer.max_epochs 1 \
	  && clip-lightning index runs/*/model scenes --out index \
	  && clip-lightning search index "a large red circle left of a small blue square" \
	  && python $(CURDIR)/examples/library.py runs/* scenes/00000.jpg \
	  && rm -rf $$trial

release: check docs test wheel  ## everything that a release needs: all checks, then the wheel and sdist in dist/
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) && grep -q "^## \[$$version\] - " CHANGELOG.md \
	  || { echo "CHANGELOG.md has no dated section for version $$version" >&2; exit 1; }
	@ls -l dist

notebooks: $(DEV)  ## run the notebooks and store what they show
	$(VENV)/bin/python examples/notebooks.py

options: $(DEV)  ## generate the table of options for fit --help and docs/options.md
	$(VENV)/bin/python tests/options.py

clean:  ## remove build products and caches (runs and the virtual environment stay)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  v >= (3, 11, 4) or sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}.{v[2]}, 3.11.4 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(QUICKSTART): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing clip-lightning with two small pretrained towers (some minutes, some gigabytes the first time)"
	@$(INSTALL) --editable ".[quickstart,app]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing clip-lightning and its development tools (some minutes, some gigabytes the first time)"
	@$(INSTALL) --editable ".[dev]"
	@touch $(QUICKSTART) $@
