# make demo: the main job, end to end. make test: every test. Both need nothing but Python 3.11+ and pip.
PYTHON ?= python3
VENV ?= .venv
# One torch for everybody; pip takes a CPU build of it where it is offered one.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-all install clean
install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,search,test]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/slimgemm demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# Also every shipped configuration of every kernel, built ahead of time: an hour on two cores.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build out
