# GNU make. `make train` on a fresh clone does everything; `make help` lists the rest.

PYTHON_VERSION ?= 3.10
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
LOCKED := 3.10 3.11 3.12 3.13
# uv wants the extras one by one. On Python 3.11 and later `launchpad` is empty. Notebooks run on today's Pythons only:
# they would make the first `make train` longer.
EXTRAS := --extra atari --extra video --extra dev --extra launchpad

SANITIZED := build/sanitizers
# Outside the packages of the environment: `make train` does not wait for them, and see pyproject.toml.
SPHINX := $(VENV)/docs

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow test-sanitizers chaos doctor lint format docs lock clean-venv

help: ## Show this.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "ARGS='...' is handed on: make train ARGS='--runtime threads', make test ARGS='-k vtrace'"

install: ## Make .venv with the pinned packages (the targets below do this by themselves).
	@bash requirements/install.sh $(PYTHON_VERSION) $(VENV)

train: install ## Train on Catch, into runs/catch; the same command again resumes.
	$(PY) launch/local.py --config configs/catch.py --workdir runs/catch $(ARGS)

test: install ## Run all tests but the slow ones, in two processes.
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: install ## Run the slow tests.
	$(PY) -m pytest -m slow $(ARGS)

# The package is copied beside kernels of its own, which come before the checkout on sys.path only if pytest appends.
# Python is not instrumented, so both runtimes must be loaded before it, and what it does not free is not reported.
test-sanitizers: install ## Run the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
	rm -rf $(SANITIZED)
	CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -w' \
	  LDFLAGS='-fsanitize=address,undefined' \
	  $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	grep -q __asan_init $(SANITIZED)/lib/impala_jax/kernels/_kernels*.so  # Else nothing would be checked.
	PYTHONPATH=$(SANITIZED)/lib JAX_PLATFORMS=cpu ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  $(VENV)/bin/pytest --import-mode=append tests/kernels/test_layers.py tests/core/test_vtrace.py -m 'not slow' \
	  -k 'random_shapes or any_batch or not_finite or population or auto or any_knobs' $(ARGS)

chaos: install ## Break runs and judge how they end; ARGS='--cases 60 --processes 2'. Goes on where it was.
	$(PY) -m tests.chaos $(ARGS)

doctor: install ## Show what works on this machine, and what to do about the rest.
	$(PY) -m impala_jax doctor $(ARGS)

lint: install ## Check style and types.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: install ## Put the code into the project's style.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: install ## Build the documentation into build/docs; warnings are errors.
	@cmp -s requirements/docs.txt $(SPHINX)/installed.txt || { rm -rf $(SPHINX) && \
	  $(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(SPHINX) -r requirements/docs.txt && \
	  cp requirements/docs.txt $(SPHINX)/installed.txt; }
	PYTHONPATH=$(SPHINX) JAX_PLATFORMS=cpu $(PY) -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs $(ARGS)
	@echo 'build/docs/index.html is ready.'

lock: ## Write the pins in requirements/ again from pyproject.toml (needs uv).
	@command -v uv >/dev/null || { echo "make lock needs uv: python -m pip install uv" >&2; exit 1; }
	@set -e; for version in $(LOCKED); do \
	  notebooks='--extra notebooks'; [ $$version != 3.10 ] || notebooks=; \
	  uv pip compile pyproject.toml $(EXTRAS) $$notebooks --python-version $$version --upgrade --quiet \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	    --output-file requirements/py$$(echo $$version | tr -d .).txt; \
	  echo "requirements for Python $$version written"; \
	done
	@uv pip compile --group docs --python-version 3.10 --upgrade --quiet --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --output-file requirements/docs.txt

clean-venv: ## Delete the virtual environments.
	rm -rf .venv .venv3*
