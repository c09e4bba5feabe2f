# make demo   environment if missing, then the whole job on the built-in data: teacher, student, distilled student
# make test   environment if missing, then lint, types, layers, known vulnerabilities, tests
# make restarts  a run of two processes on two agents, killed at 16 different points
# make quick  the parts of `make test` that take a minute: for the time between two edits
# make fuzz   give the tool broken files of every format, about half an hour; FUZZ_ARGS="--target coco --number 17" repeats one
# make site   environment if missing, then the documentation as a site in site/; fails on a dead link
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
FUZZ_ARGS ?=

.PHONY: demo test quick restarts fuzz site env clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,slurm,timm,transformers,video]'
	touch $@

demo: env
	$(BIN)/gdetkd demo $(DEMO_ARGS)

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/audit.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

quick: env
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/recipe tests/methods tests/data tests/evaluation tests/engine tests/docs tests/test_api.py

restarts: env
	GDETKD_KILLS=16 $(BIN)/pytest tests/commands/test_processes.py

fuzz: env
	$(BIN)/python tests/fuzz $(FUZZ_ARGS)

site: env
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/site.py
	$(BIN)/zensical build --strict --clean

clean:
	rm -rf $(VENV) dist build site
