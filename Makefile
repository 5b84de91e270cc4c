# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up $(VENV) themselves.
PYTHON ?= python3
VENV ?= .venv
# The plain requirement would bring gigabytes of CUDA; a CPU build is enough for demo and tests.
TORCH ?= torch==2.13.0
# The oldest one that pyproject.toml claims; the rest is in requirements/oldest.txt.
TORCH_OLDEST ?= torch==2.9.0
VENV_OLDEST ?= .venv-oldest
VENV_TOOLS ?= .venv-tools
VENV_DOCS ?= .venv-docs
# The tests of the adapters, the commands, the zoo and what they are built on. Exporting needs newer versions, and its tests are skipped.
TESTS_OLDEST := $(addprefix tests/test_,accelerate.py baselines.py cli.py commands.py controller.py costs.py estimate.py files.py hf.py \
	lightning.py options.py quality.py remote.py report_logs.py report_page.py runtime.py saying.py state.py state_file.py watching.py) \
	$(wildcard tests/test_torch_*.py tests/test_zoo*.py)
# What the wheel is installed with for `make sbom`.
SBOM_EXTRAS ?= cpu,zoo
# What a wheel may have: four predictors take most of it.
WHEEL_BYTES ?= 4194304
# The parser of Triton's model configurations, for the tests.
TRITON ?= tritonclient[grpc]
# The tests run Keras on each of its backends.
KERAS ?= keras==3.15.1 tensorflow-cpu==2.21.0 jax==0.10.2 tensorboard
EXTRAS := build demo plots hf lightning hub signatures ray serve cpu
comma := ,
space := $(subst ,, )
RUN := $(VENV)/bin/python -m
DATA ?= $(SMARTFRZ_DATA)
RUNS ?= runs
DATASET ?= dataset/smartfrz.parquet
# What the dataset, and so smartfrz-base 3, is made from. The others are for its next version: nobody has measured yet what
# freezing costs there.
RECORDED := mobilenetv2-imagenet-to-fashion efficientnet-imagenet-to-cifar10 minilm-sst2 vit-fashion vit-fashion-to-mnist \
	vgg-cifar10 vgg-cifar10-to-fashion vgg-plain-fashion vgg-plain-fashion-to-cifar10 \
	resnet14-cifar10 resnet14-fashion resnet14-cifar10-to-fashion
RECIPES := $(RECORDED:%=recipes/%.toml)

.PHONY: help demo test oldest lint docs format lock sbom sbom-of-wheel release bench bench-gpu predictor recordings clean

help:
	@echo "make demo       fine-tune a pretrained network fully and with SmartFRZ, and compare (about 4 minutes)"
	@echo "make test       run all tests"
	@echo "make oldest     run the adapters', the commands' and the zoo's tests with the oldest versions that we claim (requirements/oldest.txt)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the documentation into site/, with all links checked but those to other hosts"
	@echo "make lock       write requirements/development.txt anew: every package but PyTorch, with hashes"
	@echo "make sbom       build the wheel and write the bill of materials of an installation beside it (CycloneDX)"
	@echo "make release    build and check what is released, install it in fresh environments, and say what is left to do"
	@echo "make bench      measure everything that benchmarks/README.md says of a CPU, and more: many hours (SMARTFRZ_DATA)"
	@echo "make bench-gpu  measure networks at their real size in ten minutes of a GPU, and fill benchmarks/README.md"
	@echo "make predictor  train smartfrz-base anew, from $(DATASET) if it exists, else from recordings"
	@echo "make recordings record its recipes: many hours (SMARTFRZ_DATA names the data folder)"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install -q --disable-pip-version-check "$(TORCH)" -e ".[$(subst $(space),$(comma),$(EXTRAS))]" peft $(KERAS) \
		"$(TRITON)" "jsonargparse[signatures]" hydra-core nbclient ipykernel pytest pytest-xdist hypothesis "pandas>=2.3" ruff mypy
	touch $@

# The JavaScript example is a test as well. Nothing but the package itself is fetched.
examples/node_modules/.installed: examples/package.json
	cd examples && npm install --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/smartfrz demo

test: $(VENV)/.installed $(if $(shell command -v npm),examples/node_modules/.installed)
	$(RUN) pytest -n auto --dist loadscope

$(VENV_OLDEST)/.installed: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install -q --disable-pip-version-check "$(TORCH_OLDEST)" -r requirements/oldest.txt \
		-e ".[hf,lightning,hub,signatures,cpu]" pytest pytest-xdist hypothesis
	touch $@

oldest: $(VENV_OLDEST)/.installed
	$(VENV_OLDEST)/bin/python -m pytest -n auto --dist loadscope $(TESTS_OLDEST)

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# Nothing of SmartFRZ's dependencies is needed: the API is read from the source. The packages are pyproject.toml's group `docs`.
$(VENV_DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"  # which knows groups
	$(VENV_DOCS)/bin/python -m pip install -q --disable-pip-version-check --group docs
	touch $@

# The variable turns an advertisement off.
docs: $(VENV_DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

format: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV_TOOLS)/.installed:
	$(PYTHON) -m venv $(VENV_TOOLS)
	$(VENV_TOOLS)/bin/python -m pip install -q --disable-pip-version-check uv build twine cyclonedx-bom
	touch $@

# PyTorch is left out: the builds for CPU, and for each CUDA, come from indexes of their own, with other hashes.
lock: $(VENV_TOOLS)/.installed
	$(VENV_TOOLS)/bin/uv pip compile -q --no-config --no-cache --no-annotate --python-version 3.11 --generate-hashes \
		--default-index https://pypi.org/simple --no-emit-index-url --custom-compile-command "make lock" \
		--group test --group lint $(foreach extra,$(EXTRAS),--extra $(extra)) --no-emit-package torch --no-emit-package triton \
		pyproject.toml requirements/newest.txt --output-file requirements/development.txt
	sed -i '/^nvidia-/,/[^\\]$$/d; /^cuda-/,/[^\\]$$/d' requirements/development.txt

# The bill of materials of what a user gets: the wheel and its extras in a fresh environment, without any tool of ours.
sbom: $(VENV_TOOLS)/.installed
	rm -rf dist/*.whl
	$(VENV_TOOLS)/bin/python -m build --wheel --outdir dist
	$(MAKE) --no-print-directory sbom-of-wheel

sbom-of-wheel: $(VENV_TOOLS)/.installed
	rm -rf .venv-sbom
	$(PYTHON) -m venv --without-pip .venv-sbom
	$(VENV_TOOLS)/bin/uv pip install -q --no-config --python .venv-sbom/bin/python "$$(ls dist/*.whl)[$(SBOM_EXTRAS)]"
	$(VENV_TOOLS)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		--output-file "$$(ls dist/*.whl | cut -d- -f1,2).cdx.json" .venv-sbom/bin/python
	rm -rf .venv-sbom

# Uploads nothing.
release: $(VENV_TOOLS)/.installed
	rm -rf dist
	$(VENV_TOOLS)/bin/python -m build -q --outdir dist
	$(VENV_TOOLS)/bin/python -m twine check --strict dist/*
	@size=$$(cat dist/*.whl | wc -c); echo "The wheel has $$size bytes; at most $(WHEEL_BYTES) are allowed."; test $$size -le $(WHEEL_BYTES)
	UV=$(abspath $(VENV_TOOLS))/bin/uv PYTHON=$(PYTHON) TORCH="$(TORCH)" .ci/try-wheel "$$(ls $(CURDIR)/dist/*.whl)"
	$(MAKE) --no-print-directory sbom-of-wheel
	@echo "dist/ is ready. Left to do by hand:"
	@if grep -q example.invalid pyproject.toml; then echo "- put the real addresses into [project.urls] of pyproject.toml, and run this again"; fi
	@if grep -q "^## Unreleased" CHANGELOG.md; then echo "- give the section Unreleased of CHANGELOG.md this version and a date"; fi
	@if ! grep -q "^version: $$(ls dist/*.whl | cut -d- -f2)$$" CITATION.cff; then echo "- put this version into CITATION.cff"; fi
	@echo "- make test, make oldest, and tests/test_cuda.py on a machine with a GPU"
	@echo "- git tag -s v$$(ls dist/*.whl | cut -d- -f2), and push it"
	@echo "- $(VENV_TOOLS)/bin/twine upload dist/*.whl dist/*.tar.gz"
	@echo "- publish dist/*.cdx.json beside them"

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
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.rates run --tier imagenet --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.fronts run --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.fronts run --tier long --cache --folder $(RUNS)/compare
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.fronts run --tier imagenet --folder $(RUNS)/compare
	$(RUN) benchmarks.fronts picture
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

# Fits in ten minutes of one GPU; what was cut off goes on where it stopped.
bench-gpu: $(VENV)/.installed
	SMARTFRZ_DATA="$(DATA)" $(RUN) benchmarks.full_size run
	$(RUN) benchmarks.tables

# From the dataset, if there is one; else from recordings, which take hours.
predictor: $(VENV)/.installed $(if $(wildcard $(DATASET)),,recordings)
	OMP_NUM_THREADS=1 $(VENV)/bin/smartfrz-build train $(or $(wildcard $(DATASET)),$(RUNS)) --labels costs --output $(RUNS)/smartfrz-base.onnx
	sha256sum $(RUNS)/smartfrz-base.onnx smartfrz/zoo/smartfrz-base.onnx

recordings: $(VENV)/.installed
	$(VENV)/bin/python recipes/fetch.py
	SMARTFRZ_DATA="$(DATA)" $(VENV)/bin/smartfrz-build record $(RECIPES) --output $(RUNS) --workers 2 --threads 1 --costs

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_TOOLS) $(VENV_DOCS) demo-output site
