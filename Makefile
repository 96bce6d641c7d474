# The ways in: `make demo` and `make test`. Everything runs in .venv, which is made where it lacks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo
ADAPTED := gn-source gn-tent gn-mgtta bn-source bn-bnstats bn-tent
EPISODIC := mt3-source mt3-mt3

.PHONY: help setup browser demo docs test test-all lint format bench clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed  ## Make .venv and install everything into it

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

browser:  # Chromium, in which the pages are tested: by root on Debian and Ubuntu; elsewhere those tests skip
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install --yes chromium >/dev/null; } || \
	  echo "Chromium is missing: the tests of pages will be skipped"

demo: setup  ## Train small models and a rule on digits, adapt through 15 corruptions, write the report
	@test ! -e $(RUNS) || { echo "$(RUNS) exists and is never overwritten: make demo RUNS=another/folder"; exit 2; }
	$(BIN)/tta fit -c configs/fit/digits_gn.yaml --trainer.run_dir $(RUNS)/gn
	$(BIN)/tta fit -c configs/fit/digits_bn.yaml --trainer.run_dir $(RUNS)/bn
	$(BIN)/tta fit -c configs/fit/mgg.yaml --model.method.network $(RUNS)/gn/checkpoints/best.ckpt --trainer.run_dir $(RUNS)/mgg
	$(BIN)/tta fit -c configs/fit/jt_digits.yaml --trainer.run_dir $(RUNS)/jt
	$(BIN)/tta fit -c configs/fit/mt3_digits.yaml --model.network $(RUNS)/jt/checkpoints/last.ckpt --trainer.run_dir $(RUNS)/mt3
	$(MAKE) --no-print-directory $(addprefix $(RUNS)/,$(ADAPTED) $(EPISODIC))
	$(BIN)/tta compare $(addprefix $(RUNS)/,$(EPISODIC)) -o $(RUNS)/episodic
	$(BIN)/tta report $(addprefix $(RUNS)/,$(EPISODIC)) -o $(RUNS)/episodic/report.html
	$(BIN)/tta compare $(addprefix $(RUNS)/,$(ADAPTED)) -o $(RUNS)
	$(BIN)/tta report $(addprefix $(RUNS)/,$(ADAPTED)) -o $(RUNS)/report.html

# one run: the model before the dash, the configuration of the method after it
$(RUNS)/gn-mgtta: RULE := --model.rule.checkpoint $(RUNS)/mgg/checkpoints/best.ckpt
$(RUNS)/gn-%:
	$(BIN)/tta adapt -c configs/adapt/$*.yaml -c configs/stream/digits.yaml \
	  --model.network $(RUNS)/gn/checkpoints/best.ckpt --trainer.run_dir $@ $(RULE)
$(RUNS)/bn-%:
	$(BIN)/tta adapt -c configs/adapt/$*.yaml -c configs/stream/digits.yaml \
	  --model.network $(RUNS)/bn/checkpoints/best.ckpt --trainer.run_dir $@

# MT3 takes a twentieth of a second an image, so it gets fewer of them
$(RUNS)/mt3-%:
	$(BIN)/tta adapt -c configs/adapt/$*.yaml -c configs/stream/digits.yaml --data.limit 100 \
	  --model.network $(RUNS)/mt3/checkpoints/last.ckpt --trainer.run_dir $@

docs: setup  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: setup browser  ## Run the tests
	$(BIN)/pytest

test-all: setup browser  ## Run the tests, those that take long too
	TTA_FUZZ_EXAMPLES=2000 $(BIN)/pytest -m ""

lint: setup  ## Check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: setup  ## Format the code and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup  ## Time adapt against a bare loop, its memory on a long stream, and `tta --help`
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/long_stream.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/learned_rule_cost.py
	$(BIN)/python benchmarks/stag_cost.py
	$(BIN)/python benchmarks/mt3_cost.py
	$(BIN)/python benchmarks/method_cost.py

clean:  ## Remove .venv and caches; runs stay
	rm -rf $(VENV) build site .cache *.egg-info .pytest_cache .ruff_cache .mypy_cache
