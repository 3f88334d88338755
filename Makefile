# make demo   the whole night in small, on real parts (about 6 minutes on 2 cores, then from what is there)
# make test   every test that this machine can run
# make check  formatting, lint and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= demo

# The CUDA build of vLLM where there is an NVIDIA GPU, the CPU build elsewhere; they exclude each other.
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# The CPU build wants torch's "+cpu" wheel: from a folder where the environment names one (pip's setting serves uv
# too), from PyTorch's own index otherwise.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH := $(if $(UV_FIND_LINKS),,$(if $(filter cpu,$(ENGINE)),--torch-backend=cpu))
READY := $(VENV)/.ready-$(ENGINE)

# What the tests of the review page need besides: a browser, its accessibility checker, and the packages of two
# labelling tools, which want other versions than ours and so live in an environment of their own. So do servers of S3
# and of Google's storage (Azure's comes from npm), and two trainers that are handed a dataset: what reads their settings,
# without what they train with. And IFBench's prompts and checkers, by which our checks are checked.
AXE := axe-core@4.14.1
AZURITE := azurite@3.35.0
TOOLS := argilla==2.8.0 label-studio-sdk==2.1.2 'moto[s3]==5.2.5' flask flask-cors hydra-core==1.3.8 \
	gcp-storage-emulator==2026.7.19
BARE := verl==0.9.1 openrlhf==0.11.2 nvidia-ifbench==26.3
BROWSER := $(VENV)/.browser

.PHONY: setup demo test check format clean
setup: $(READY) $(BROWSER)

$(READY): pyproject.toml
	@echo "== Setting up $(VENV) with the $(ENGINE) build of vLLM, TRL and the tests' tools."
	@echo "   Usually half a minute from a warm cache, some minutes of downloads otherwise (3.5 GB on disk)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rlaif needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -e '.[$(ENGINE),train,checks,review,cluster]' --group dev
	@rm -f $(VENV)/.ready-* && touch $@

# Where a part cannot be had, its tests say so and are skipped; under CI=true they fail.
$(BROWSER): $(READY) Makefile
	@lacking=$$(for part in chromium npm; do command -v $$part >/dev/null || echo $$part; done); \
		if test -n "$$lacking"; then \
			echo "   Installing $$lacking for the browser tests."; \
			{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$lacking >/dev/null; } || \
			echo "   Not possible here. As root, on Debian: apt-get install" $$lacking; \
		fi
	@rm -rf $(VENV)/axe && mkdir -p $(VENV)/axe && cd $(VENV)/axe && \
		{ npm pack --silent $(AXE) >/dev/null && tar xzf axe-core-*.tgz package/axe.min.js && rm axe-core-*.tgz; } || \
		echo "   No $(AXE): the accessibility tests need it."
	@npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite $(AZURITE) >/dev/null || \
		echo "   No $(AZURITE): the test of az:// needs it."
	@{ test -x $(VENV)/tools/bin/python || $(BIN)/uv venv --quiet $(VENV)/tools; } && \
		$(BIN)/uv pip install --quiet --python $(VENV)/tools/bin/python $(TOOLS) && \
		$(BIN)/uv pip install --quiet --python $(VENV)/tools/bin/python --no-deps $(BARE) || \
		echo "   No $(TOOLS) $(BARE): what is tested with these packages is then left out or tested without."
	@touch $@

demo: $(READY)
	@BIN=$(BIN) RUN=$(RUN) sh examples/demo/run.sh

# Tests that share the one vLLM server stay together in one worker; training runs beside them in the other.
test: $(READY) $(BROWSER)
	@echo "== Running every test, real vLLM and TRL included: usually 20 minutes on 2 cores."
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(RUN)
