# make demo: install into .venv and train a small GPT-2 with learnable activations beside GELU.
# make test: install into .venv, check style and types, build the documentation, run every test but those of
#   integrations. WORKERS=4 takes more processes.
# make test-integrations: add the libraries that ortho_fx works with (transformers, PEFT, timm, Lightning, Accelerate,
#   torchao, torchtitan, OpenFHE, TenSEAL), and run the tests with them.
# make quick: style, and the tests that take little time: those that are not marked slow, and a few that compile.
# make docs: build the documentation into build/site.
# make wheel: build dist/*.whl, and check it in an environment that holds it, PyTorch and numpy alone. TORCH="torch==2.13.0"
#   takes another release than the newest.
# make completions: write ortho_fx/cli/completions.json anew, from which a shell's completions come.
# make compat: check every supported release of PyTorch, each in an environment of its own, an hour in all, for the
#   table in README.md. make compat RELEASES="2.14.1 2.15.0" checks these alone.
# make compat-2.13.0: check one release, and write the record into build/.
PYTHON ?= python3
RELEASES ?=
WORKERS ?= 2
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A test process has one thread: several processes share the cores. Each takes a row of tests, so that most fixtures of a
# module are made once, and then what is left of the others' rows.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Where the tests are that need libraries beyond those of `make install`.
INTEGRATIONS := tests/ortho_fx/integrations
# Files with a test that skips without these libraries.
WITH_LIBRARIES := $(addprefix tests/passes/source/test_,alternatives.py looking.py pickles.py)

.PHONY: install demo test test-integrations quick lint typecheck docs completions wheel compat clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt ortho_fx/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[train,onnx,completion,test,lint,docs]"
	touch $@

demo: install
	$(BIN)/ortho-fx train gpt2 --basis hermite --degree 3 --steps 200 --eval-every 50 --beside-gelu --overwrite --out runs/demo

test: lint typecheck docs
	$(PYTEST) --ignore=$(INTEGRATIONS)

test-integrations: $(VENV)/.integrations
	$(PYTEST) $(INTEGRATIONS) $(WITH_LIBRARIES)

$(VENV)/.integrations: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[integrations,encrypted]"
	touch $@

quick: lint
	$(PYTEST) -m "not slow or smoke" --ignore=$(INTEGRATIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the package as it installs: passes/ and models/ inside ortho_fx.
typecheck: install build/typed
	MYPYPATH=build/typed $(BIN)/mypy -p ortho_fx

docs: install build/typed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

completions: install
	$(BIN)/python -c "from ortho_fx.cli import make_parser, suggestions; suggestions.write(make_parser())"

wheel:
	rm -rf dist build/lib build/bdist.* build/wheel && $(PYTHON) -m venv build/wheel
	build/wheel/bin/pip wheel --quiet --no-deps -w dist .
	build/wheel/bin/pip install --quiet "$(TORCH)" dist/*.whl
	build/wheel/bin/python tests/wheel.py dist/*.whl
	rm -rf build/wheel

compat:
	$(PYTHON) benchmarks/compat.py run $(if $(RELEASES),--releases $(RELEASES))

compat-%:
	$(PYTHON) benchmarks/compat.py run --releases $* --out build/compat-$*.json

.PHONY: build/typed
build/typed:
	rm -rf $@ && mkdir -p $@/ortho_fx
	ln -s $(CURDIR)/ortho_fx/* $(CURDIR)/passes $(CURDIR)/models $@/ortho_fx/

clean:
	rm -rf $(VENV) build dist *.egg-info
