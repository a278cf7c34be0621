# GNU make. `make train` on a fresh clone does everything; `make help` lists the rest.

# Such as 3.12. auto: that of $(VENV), else 3.10 with Launchpad where there is one, else the newest.
PYTHON_VERSION ?= auto
VENV ?= .venv
ARGS ?=
# An extra of pyproject.toml in addition to the pins: make install EXTRA=cuda
EXTRA ?=
PY := $(VENV)/bin/python
LOCKED := 3.10 3.11 3.12 3.13 3.14
# uv needs the extras one by one. On Python 3.11 and later `launchpad` is empty. On Python 3.10 the extra for notebooks
# is left out, because it would slow down the first `make train`, and so is Ray, which needs a newer protobuf than
# Launchpad's TensorFlow.
EXTRAS := --extra atari --extra video --extra dev --extra launchpad

SANITIZED := build/sanitizers
# Outside the packages of the environment: `make train` does not wait for them, and see pyproject.toml.
SPHINX := $(VENV)/docs

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow test-sanitizers chaos doctor lint format docs lock clean-venv

help: ## Show this help.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "ARGS adds arguments: make train ARGS='--runtime threads', make test ARGS='-k vtrace'"

install: ## Create .venv with the pinned packages (the targets below do this automatically).
	@bash requirements/install.sh $(PYTHON_VERSION) $(VENV)
	@[ -z '$(EXTRA)' ] || $(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation \
	  --constraint requirements/py$$($(PY) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt --editable '.[$(EXTRA)]'

train: install ## Train on Catch, into runs/catch; repeat the command to resume.
	$(PY) launch/local.py --config configs/catch.py --workdir runs/catch $(ARGS)

test: install ## Run all tests except the slow ones, in two processes.
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: install ## Run the slow tests.
	$(PY) -m pytest -m slow $(ARGS)

# A copy of the package is built with instrumented kernels; it precedes the checkout on sys.path only if pytest appends.
# Python itself is not instrumented, so the sanitizer runtimes must be preloaded, and leaks are not reported.
test-sanitizers: install ## Run the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
	rm -rf $(SANITIZED)
	CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -w' \
	  LDFLAGS='-fsanitize=address,undefined' \
	  $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	grep -q __asan_init $(SANITIZED)/lib/impala_jax/kernels/_kernels*.so  # Otherwise nothing would be checked.
	PYTHONPATH=$(SANITIZED)/lib JAX_PLATFORMS=cpu ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  $(VENV)/bin/pytest --import-mode=append tests/kernels/test_layers.py tests/core/test_vtrace.py -m 'not slow' \
	  -k 'random_shapes or any_batch or not_finite or population or auto or any_knobs' $(ARGS)

chaos: install ## Inject faults into runs and check how they end; ARGS='--cases 60 --processes 2'. Repeat to resume.
	$(PY) -m tests.chaos $(ARGS)

doctor: install ## Check what works on this machine, and how to fix the rest.
	$(PY) -m impala_jax doctor $(ARGS)

lint: install ## Check style and types.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: install ## Format the code.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: install ## Build the documentation into build/docs; warnings are errors.
	@cmp -s requirements/docs.txt $(SPHINX)/installed.txt || { rm -rf $(SPHINX) && \
	  $(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(SPHINX) -r requirements/docs.txt && \
	  cp requirements/docs.txt $(SPHINX)/installed.txt; }
	PYTHONPATH=$(SPHINX) JAX_PLATFORMS=cpu $(PY) -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs $(ARGS)
	@echo 'build/docs/index.html is ready.'

lock: ## Update the pinned packages in requirements/ from pyproject.toml (needs uv).
	@command -v uv >/dev/null || { echo "make lock needs uv: python -m pip install uv" >&2; exit 1; }
	@set -e; for version in $(LOCKED); do \
	  later='--extra ray --extra notebooks'; [ $$version != 3.10 ] || later=; \
	  uv pip compile pyproject.toml $(EXTRAS) $$later --python-version $$version --upgrade --quiet \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	    --output-file requirements/py$$(echo $$version | tr -d .).txt; \
	  echo "requirements for Python $$version written"; \
	done
	@uv pip compile --group docs --python-version 3.10 --upgrade --quiet --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --output-file requirements/docs.txt

clean-venv: ## Delete the virtual environments.
	rm -rf .venv .venv3*
