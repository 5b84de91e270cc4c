# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up $(VENV) themselves.
PYTHON ?= python3
VENV ?= .venv
# The plain requirement would bring gigabytes of CUDA; a CPU build is enough for demo and tests.
TORCH ?= torch==2.13.0
# The parser of Triton's model configurations, for the tests.
TRITON ?= tritonclient[grpc]
# The tests run Keras on each of its backends.
KERAS ?= keras==3.15.1 tensorflow-cpu==2.21.0 jax==0.10.2 tensorboard
RUN := $(VENV)/bin/python -m
DATA ?= $(SMARTFRZ_DATA)
RUNS ?= runs
# What smartfrz-base 2 is made from. The others are for judging it, and for its next version.
RECIPES := $(filter-out %-long.toml %-halves.toml %-pairs.toml,$(wildcard recipes/*.toml))

.PHONY: help demo test lint format bench bench-gpu predictor clean

help:
	@echo "make demo       fine-tune a pretrained network fully and with SmartFRZ, and compare (about 6 minutes)"
	@echo "make test       run all tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      measure everything that benchmarks/README.md says of a CPU, and more: many hours (SMARTFRZ_DATA)"
	@echo "make bench-gpu  measure the paper's architectures on a GPU, and fill benchmarks/README.md"
	@echo "make predictor  record its recipes and train smartfrz-base anew (SMARTFRZ_DATA names the data folder)"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install -q --disable-pip-version-check "$(TORCH)" -e ".[build,demo,hf,lightning,hub,signatures,ray,serve,cpu]" peft $(KERAS) \
		"$(TRITON)" pytest pytest-xdist hypothesis "pandas>=2.3" ruff mypy
	touch $@

# The JavaScript example is a test as well. Nothing but the package itself is fetched.
examples/node_modules/.installed: examples/package.json
	cd examples && npm install --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/smartfrz demo

test: $(VENV)/.installed $(if $(shell command -v npm),examples/node_modules/.installed)
	$(RUN) pytest -n auto --dist loadscope

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: $(VENV)/.installed
	$(VENV)/bin/python recipes/fetch.py
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare pretrain --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.rates run --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare run --folder $(RUNS)/compare
	$(RUN) benchmarks.compare plots --pictures benchmarks/pictures
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare run --methods tradeoff --folder $(RUNS)/compare
	$(RUN) benchmarks.compare plots --methods tradeoff --pictures benchmarks/pictures
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.rates run --tier long --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare run --tier long --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare run --methods sweeps --tasks vgg-cifar10 --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.predictor_tables figure --folder $(RUNS)/compare
	$(RUN) benchmarks.predictor_tables costs
	if ls $(RUNS)/*.parquet > /dev/null 2>&1; then $(RUN) benchmarks.predictor_tables run --runs $(RUNS); fi
	$(RUN) benchmarks.tables
	$(RUN) benchmarks.overhead
	$(RUN) benchmarks.baselines
	$(RUN) benchmarks.decision
	$(RUN) benchmarks.keras_fit --backends torch
	$(RUN) benchmarks.keras_step

bench-gpu: $(VENV)/.installed
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare pretrain --tier gpu --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.compare run --tier gpu --folder $(RUNS)/compare
	$(RUN) benchmarks.tables

predictor: $(VENV)/.installed
	$(VENV)/bin/python recipes/fetch.py
	SMARTFRZ_DATA="$(DATA)" $(VENV)/bin/smartfrz-build record $(RECIPES) --output $(RUNS) --workers 2 --threads 1
	$(VENV)/bin/smartfrz-build train $(RUNS) --output $(RUNS)/smartfrz-base.onnx
	@echo "Compare $(RUNS)/smartfrz-base.md with smartfrz/zoo/smartfrz-base.md"

clean:
	rm -rf $(VENV) demo-output
