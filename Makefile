# make demo: install into .venv and train a small GPT-2 with learnable activations beside GELU.
# make test: install into .venv, check style and types, run every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint typecheck clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[train,test,lint]"
	touch $@

demo: install
	$(BIN)/ortho-fx train gpt2 --basis hermite --degree 3 --steps 200 --eval-every 50 --beside-gelu --overwrite --out runs/demo

test: lint typecheck
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the package as it installs: passes/ and models/ inside ortho_fx.
typecheck: install
	rm -rf build/typed && mkdir -p build/typed/ortho_fx
	ln -s $(CURDIR)/ortho_fx/* $(CURDIR)/passes $(CURDIR)/models build/typed/ortho_fx/
	MYPYPATH=build/typed $(BIN)/mypy -p ortho_fx

clean:
	rm -rf $(VENV) build dist *.egg-info
