# make setup  everything that the other commands need, in .venv; goes on from where it was interrupted
# make demo   the whole night in small, on real parts (about 6 minutes on 2 cores); DEMO=folder puts it elsewhere
# make test   every test that this machine can run; TESTS=tests/pair/test_candidates.py runs some
# make check  formatting, lint, language, types, Dockerfiles and package
# make clean  deletes .venv and the demo's folder, if make created them

VENV := .venv
BIN := $(VENV)/bin
# Set here, not with ?=, so that variables of the same names in the environment change nothing.
DEMO := demo
TESTS :=
ENGINE :=
# The file by which make recognizes the folders that it created. It deletes no others.
MADE := .made-by-make

# The Python to build .venv from. Once .venv works, its own.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell $(BIN)/python -c 'print("$(BIN)/python")' 2>/dev/null || echo python3)
endif

# Without bytecode, every start of vLLM would compile torch and vLLM again, in three processes.
unexport PYTHONDONTWRITEBYTECODE
# Recipes read the folder from the environment, because a name may hold spaces and quotes.
export DEMO

define set-up
@version=$$("$(PYTHON)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null) || { echo "rlaif needs Python 3.11 or newer, and $(PYTHON) $${version:+is }$${version:-does not run}." \
	"hint: make PYTHON=python3.12 setup"; exit 4; }
@exec "$(PYTHON)" scripts/set_up.py $(addprefix --engine=,$(ENGINE)) $(1)
endef

.PHONY: setup demo test check format clean
setup:
	$(call set-up)
	@echo "== $(VENV) is ready."

demo:
	$(call set-up,environment bytecode)
	@test -e "$$DEMO" || { mkdir -p "$$DEMO" && touch "$$DEMO/$(MADE)"; }
	@$(BIN)/python examples/demo/demo.py "$$DEMO"

# Tests that share the one vLLM server stay together in one worker; training runs beside them in the other.
test:
	$(call set-up)
	@echo "== Running every test, real vLLM and TRL included: usually 20 minutes on 2 cores."
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

check:
	$(call set-up,environment)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/check_language.py
	$(BIN)/python -m mypy
	$(BIN)/hadolint Dockerfile docker/*.Dockerfile
	@rm -rf build/package
	$(BIN)/uv build --quiet --out-dir build/package
	$(BIN)/twine check --strict build/package/rlaif_pipeline-*

format:
	$(call set-up,environment)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	@for folder in $(VENV) "$$DEMO"; do \
		if test -e "$$folder/$(MADE)"; then \
			echo "rm -rf '$$folder'"; rm -rf -- "$$folder"; \
		elif test -e "$$folder"; then \
			echo "$$folder: not deleted, because make did not create it."; \
		fi; \
	done
