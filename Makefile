# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: install demo test clean

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q effprof methods
	touch $@

demo: install
	$(BIN)/effprof estimate --model 1b --method lowrank
	$(BIN)/effprof probe --model 9m --method galore --micro-batch 4 --seconds 10
	rm -rf $(DEMO)
	$(BIN)/effprof train --model 9m --method lowrank --micro-batch 8 --steps 100 --out $(DEMO)
	@echo "The results are in $(DEMO): model/, metrics.jsonl, summary.json, run.toml."

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto
	rm -rf build dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/python scripts/wheel_smoke.py dist

clean:
	rm -rf $(VENV) build dist runs *.egg-info
