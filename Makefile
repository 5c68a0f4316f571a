# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: install demo test docs generate release clean

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
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs
	rm -rf build dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/python scripts/wheel_smoke.py dist

# After a change of flags or of a JSON document: the help snapshots and the schemas.
generate: install
	$(BIN)/python scripts/generate.py

docs: install
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

release: install
	$(BIN)/python scripts/release.py

clean:
	rm -rf $(VENV) build dist runs *.egg-info
