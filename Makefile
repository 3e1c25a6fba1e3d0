# Every check of the project, as one command each. `make help` lists them.
# .venv is made on first use; a stamp per extra makes the second run start at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Half a second of imports a worker: more than eight would cost more than they save.
WORKERS ?= -n auto --maxprocesses 8
# Releases that `make compat` tries, and where their environments go.
TORCHES ?= 2.6.0 2.9.1 2.13.0 2.14.1 2.15.0
COMPAT_DIR ?= build/compat
# What `make quick` runs: of each test the cases that show it every kind of scheme and door, but for the tests that take long.
QUICK := --quick tests $(patsubst %,--ignore=tests/%,fuzz backends ode/test_ode_stability.py ode/test_ode_orders.py sde/test_sde_orders.py \
  works_with/test_distributed.py works_with/test_cleanup.py works_with/test_functional_adaptive.py works_with/test_modules.py \
  cde/test_cde_outputs.py fixed_points/test_recipes.py test_benchmarks.py test_docs_code.py brownian/test_threads.py \
  core/test_checkpoint_spacing.py sde/test_sde_stability.py restarts/test_scales_and_memory.py \
  restarts/test_causality.py works_with/test_divergence.py compat/test_optional.py)
# One thread a process: the same numbers on every machine, and workers that do not fight over cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets at once (make -j) would run two installers in one environment.
.NOTPARALLEL:
.PHONY: help demo quick test slow compat gpu-check format lint types docs notebooks render figures bench build check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "revsolve needs Python >= 3.10, but " \
	  "$(PYTHON) is " + sys.version.split()[0] + ": name another, as in `make demo PYTHON=python3.12`.")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/with-%: pyproject.toml constraints.txt | $(VENV)/created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# Pattern rules would otherwise treat the stamps as intermediate and delete them.
.PRECIOUS: $(VENV)/with-% $(COMPAT_DIR)/%/ready

demo: $(VENV)/with-demo ## train a Neural ODE on the lynx and hare record; writes build/demo.png
	$(BIN)/python notebooks/demo.py

test: $(VENV)/with-test ## run the test suite and the docstring examples
	$(PYTEST) $(WORKERS)

quick: $(VENV)/with-test ## run in a minute what shows each test every kind of scheme and door
	$(PYTEST) $(WORKERS) $(QUICK)

slow: $(VENV)/with-test ## run the tests that `make test` leaves out for their time
	$(PYTEST) $(WORKERS) -m slow

# An environment each, some of several GB; what a machine's own constraints say of torch is not meant for these.
$(COMPAT_DIR)/%/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	PIP_CONSTRAINT=/dev/null $(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==$* -e '.[test]'
	touch $@

compat-%: $(COMPAT_DIR)/%/ready
	$(<D)/bin/python -m pytest -p no:cacheprovider $(WORKERS) $(QUICK)

compat: $(TORCHES:%=compat-%) ## run `make quick` with every release of torch in TORCHES

gpu-check: $(VENV)/with-test ## on a machine with a GPU, in 8 minutes: its tests, CUDA graphs, adaptive steps
	$(BIN)/python .ci/gpu_check.py

format: $(VENV)/with-lint ## rewrite the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/with-lint ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/with-lint ## check the types of the package
	$(BIN)/mypy

docs: $(VENV)/with-docs ## build the documentation site into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

notebooks: $(VENV)/with-notebooks ## execute every notebook in its small mode
	$(PYTEST) $(WORKERS) notebooks/test_notebooks.py

render: $(VENV)/with-notebooks ## execute every notebook in full and keep the plots in it
	$(BIN)/python -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb

figures: $(VENV)/with-test ## draw the figures of the documentation anew
	$(BIN)/python docs/figures/draw.py

# diffrax needs JAX, which shares no package with the environment of the tests.
build/peer-jax/ready:
	$(PYTHON) -m venv build/peer-jax
	build/peer-jax/bin/python -m pip install --quiet --disable-pip-version-check 'diffrax>=0.7' 'jax>=0.4'
	touch $@

bench: $(VENV)/with-test build/peer-jax/ready ## run the benchmarks of docs/benchmarks
	$(BIN)/python docs/benchmarks/run.py

build: $(VENV)/with-build ## build sdist and wheel, and install the wheel into a fresh environment
	rm -rf dist build/fresh
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && fresh/bin/python -W error ../.ci/check_install.py

check: lint types build docs notebooks demo test ## all that CI checks, in its order

clean: ## remove what make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/notebooks
