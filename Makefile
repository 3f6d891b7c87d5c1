# make demo   set up, fetch a small real model, convert it to five formats, print the table
# make test   set up, lint, type-check, run every test
# make gpu    the tests and benchmarks that need a CUDA device; writes docs/gpu.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
LONGEST := tests/test_smollm2.py  # begun first, so that all processes end together

.PHONY: demo test gpu clean

# torch goes in first and by itself, so that whatever build of it this machine offers satisfies all that follows.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

demo: $(VENV)/ready
	@echo "fetching SmolLM2-135M-Instruct (Q4_1, 98 MB) ..."
	$(BIN)/quantkit convert "$$($(BIN)/python tests/models.py smollm2)" -o demo --recipe demo --force

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu" -n auto --dist loadfile --no-loadscope-reorder $(LONGEST) tests

gpu: $(VENV)/ready
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/gpu.py > docs/gpu.md.new && mv docs/gpu.md.new docs/gpu.md

clean:
	rm -rf $(VENV) .cache demo
