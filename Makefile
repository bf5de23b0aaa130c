# Two commands do all the set-up: `make reproduce` and `make test`. Both may be stopped and repeated.
.DEFAULT_GOAL := help
.PHONY: help setup reproduce reproduce-all bench test notebooks readme clean

VENV   ?= .venv
PRESET ?= laptop
SEEDS  ?= 1
READY  := $(VENV)/.ready

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment (1 to 3 minutes, once)

reproduce: $(READY)  ## data, training, tables and figures of the main job; SEEDS=3 for the committed table, PRESET=smoke to look
	@$(VENV)/bin/spklip reproduce --preset $(PRESET) --only 04_train --seeds $(SEEDS)

reproduce-all: $(READY)  ## every table and figure of the paper, then outputs/PRESET/report.html; PRESET=smoke to look
	@$(VENV)/bin/spklip reproduce --preset $(PRESET)

bench: $(READY)  ## time every part beside the plainest code for the same: outputs/bench
	@$(VENV)/bin/spklip bench

test: $(READY)  ## run the tests
	@$(VENV)/bin/python -m pytest

notebooks: $(READY)  ## run every notebook in place on its stored preset, then README.md
	@$(VENV)/bin/python -c "from spklip.lab.notebooks import *; rerun(); readme()"

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@$(VENV)/bin/python -c "from spklip.lab.notebooks import *; print(readme())"

TEN := $(subst x,[0-9a-f],xxxxxxxxxx)
clean:  ## forget cached runs and drawn data, whose names end in a hash (not the outputs, nor what has a name of yours)
	rm -rf runs/*-$(TEN) data/*-$(TEN)

$(READY): pyproject.toml constraints.txt
	@tools/setup $(VENV)
