# Everything runs in .venv, made on first use from requirements.lock; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: docs help faults faults-ranks notebooks test-image test-kaggle quickstart quickstart-short test test-slow lint format lock clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Ekiden needs Python 3.11 to 3.13; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "python3 cannot make an environment; run: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $(READY)

quickstart: $(READY)  ## the whole path on built-in text, minutes on a CPU
	$(BIN)/ekiden quickstart

quickstart-short: $(READY)  ## the same in a tenth of the steps
	$(BIN)/ekiden quickstart --short --output-dir $$(mktemp -d)/quickstart

test: $(READY)  ## the unit suite
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(READY)  ## the long tests
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## linter, formatter's check, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## the site, into docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## write requirements.lock from what is installed in .venv
	$(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' > requirements.lock

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info

faults: $(READY)  ## the whole fault campaign: 500 SIGKILLs, every system call, power cuts, damage, memory
	$(BIN)/python tests/faults/table.py

faults-ranks: $(READY)  ## several ranks: stopped on a, resumed on b; 100 of them killed
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/ranks.py --matrix --kills 100

notebooks: $(READY)  ## write the kept Kaggle notebooks anew
	$(BIN)/ekiden kaggle notebook notebooks/gpt2-wikitext-103.yaml --output notebooks/gpt2-wikitext-103.ipynb --package input \
	  --title "GPT-2 10M on WikiText-103" --prompt "The river" --prompt "In 1918 the"
	$(BIN)/ekiden kaggle notebook notebooks/gemma3-multilingual.yaml --output notebooks/gemma3-multilingual.ipynb --package input \
	  --title "Gemma 3 on many languages" --vocab-size 64000 \
	  --prompt "The river" --prompt "नदी" --prompt "न्हंय" --prompt "De rivier"

test-kaggle: $(READY)  ## ten legs with every fault, 50 kills of the relay, both notebooks without a network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rP tests/kaggle

test-image: $(READY)  ## the suite and one leg under the versions of Kaggle's images (5 to 8 GB each, downloaded; torch cannot be imported without its CUDA libraries)
	$(BIN)/python tests/image/run.py --folder $(or $(IMAGES),/tmp/ekiden-images) --workers $(or $(WORKERS),2)
