# The README's commands. Everything is installed into .venv by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# Debian ships python3 without venv; as root we bring it, else we say how.
DEBIAN_VENV = { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); } || { echo "error: python3 has no venv module; run: sudo apt-get install python3-venv" >&2; exit 1; }

.PHONY: demo test test-slow test-gpu lint format clean

# Probe this machine, plan the bundled model, load it in 4 bit, stream an answer, print predicted
# against measured memory, and take a few steps of a fine-tuning.
demo: $(STAMP)
	$(BIN)/oomproof doctor
	$(BIN)/oomproof plan tiny --format nf4-dq
	$(BIN)/oomproof run tiny "It was a dark night" --format nf4-dq --seed 3 --memory
	$(BIN)/oomproof rehearse tiny --tune --context 128 --batch-size 4

# Lint, types, import direction, and every fast test.
test: lint
	OMP_NUM_THREADS=1 $(PYTEST) -n 2

test-slow: $(STAMP)
	$(PYTEST) -m slow

# On a machine with an NVIDIA GPU.
test-gpu: $(STAMP)
	$(PYTEST) -m gpu

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A machine with an NVIDIA driver takes torch's CUDA build; any other the one of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("oomproof needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || $(DEBIAN_VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1,<27"
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/python -m pip install --quiet -e '.[run,tune]' --group dev; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[run,tune]' --group dev; \
	fi
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
