# Everything runs in .venv, which the first command builds from the pinned constraints.txt.
#   PYTHON=python3.12 make venv                    another interpreter (3.10 or newer)
#   PIP_EXTRA_INDEX_URL=... make venv              pip's own settings apply, for instance for a CPU build of PyTorch

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP = $(@D)/bin/python -m pip --disable-pip-version-check --quiet
SITE := .venv-site
AUDIT := .venv-audit

# DeepSpeed compiles its optional kernels when, and only if, they are used.
export DS_BUILD_OPS := 0
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

# The oldest supported DeepSpeed has an environment of its own.
OLDEST := .venv-oldest

.PHONY: venv hooks train test test-slow test-oldest coverage coverage-core lint docs site package gpu gpu-dry-run soak-saves soak mutants audit clean

venv: $(STAMP)

# PyTorch goes first and DeepSpeed builds without isolation, so that its set-up sees the pinned PyTorch, not another one.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: PYTHON=... make venv")'
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed: DeepSpeed compiles its CPU communication when it starts" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt torch numpy
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[deepspeed,megatron,dev]'
	@touch $@

train: $(STAMP)
	$(BIN)/python launch/quickstart.py

# The ranks of one test often wait for each other, so two files of tests at a time use two cores better than one.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

$(OLDEST)/.installed: setup.py pyproject.toml constraints.txt paci_schedule/adapters/versions.py
	$(PYTHON) -m venv $(OLDEST)
	sed '/^deepspeed==/d' constraints.txt > $(OLDEST)/constraints.txt
	$(PIP) install -c $(OLDEST)/constraints.txt setuptools wheel packaging
	$(PIP) install -c $(OLDEST)/constraints.txt torch numpy
	oldest=$$($(OLDEST)/bin/python -c 'import runpy; \
		from packaging.specifiers import SpecifierSet as Set; \
		at = Set(runpy.run_path("paci_schedule/adapters/versions.py")["DEEPSPEED"]); \
		print(min(each.version for each in at if each.operator == ">="))') && \
	$(PIP) install -c $(OLDEST)/constraints.txt --no-build-isolation "deepspeed==$$oldest" -e . pytest pytest-timeout
	@touch $@

# What trains, on the oldest supported DeepSpeed, whose pipelines sum the gradients of an update (docs/deepspeed.md).
test-oldest: export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(OLDEST)/torch_extensions
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -m "not slow" \
		$(foreach part,checkpoint clip equivalence switch tied,integration_tests/test_deepspeed_$(part).py)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# `git commit` runs the linters then.
hooks: $(STAMP)
	$(BIN)/pre-commit install

# The branches of the package that the tests take, folder by folder; coverage.txt has those that they do not take.
# Ranks and commands that tests start are measured too.  It takes twice as long as `make test`.
coverage: $(STAMP)
	rm -f .coverage*
	$(BIN)/coverage run -m pytest -q -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=0 --show-missing > coverage.txt
	@for folder in paci_schedule/*/; do \
		echo "$$($(BIN)/coverage report --fail-under=0 --format=total --include="$${folder}**") % of $$folder"; \
	done

# What the tests without ranks take of the core; less than the floor in pyproject.toml is an error.
coverage-core: $(STAMP)
	rm -f .coverage*
	$(BIN)/coverage run -m pytest -q -m "not slow" tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --include="paci_schedule/core/**"

# Every picture and every command's output in the documents, made anew by the commands that they name.
docs: $(STAMP)
	$(BIN)/python docs/rebuild.py

# The documentation and a release have an environment of their own, small and without PyTorch.
$(SITE)/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Sphinx needs Python 3.11: PYTHON=... make site")'
	$(PYTHON) -m venv $(SITE)
	$(PIP) install -c constraints.txt '.[docs,release]'
	@touch $@

# The documents and the API reference as a web site in build/site; a link that leads nowhere is an error.
site: $(SITE)/.installed
	$(SITE)/bin/sphinx-build --quiet --fail-on-warning --keep-going -c docs/site . build/site

# The package as it is released, in dist/.
package: $(SITE)/.installed
	rm -rf dist
	$(SITE)/bin/python -m build
	$(SITE)/bin/twine check --strict dist/*

# On a machine with a GPU, in whatever Python has a PyTorch for it: 25 minutes, one table, one JSON file.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

gpu-dry-run: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --dry-run

# 200 saves of an engine, with ranks killed at random moments of them: about 10 minutes on 2 idle cores.
soak-saves: $(STAMP)
	$(BIN)/python -m benchmarks.kill_saves --kills 200

# Random sequences of calls on all three frameworks, with faults and without, for so many seconds.
SECONDS ?= 3600
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak --seconds $(SECONDS)

# The code broken on purpose, one rule after the other: which test notices?  10 minutes on 2 idle cores.
mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants

# Known vulnerabilities of every pin; asks PyPI.  What cannot be asked about is an error, too.
$(AUDIT)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(AUDIT)
	$(PIP) install -c constraints.txt pip-audit
	@touch $@

audit: $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

clean:
	rm -rf $(VENV) $(SITE) $(AUDIT) build dist *.egg-info runs .pytest_cache .ruff_cache .coverage* coverage.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
