# make demo   run the main job on the embedded default: clips, tiny model, cold start, GRPO, report
# make test   lint-free test suite on a fresh machine (creates .venv on first use)
# make lint   ruff check and ruff format --check
# make gpu    GPU tests and benchmarks, in the Python that is given by GPU_PYTHON (default: the current python3)
# make clean  remove what this file made

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint venv gpu clean

venv: .venv/.installed

# torch first and pinned: a range would let pip choose another build
.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch triton
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[affectgpt,dev]'
	touch $@

demo: venv
	$(BIN)/python recipes/affectgpt_r1.py $(ARGS)

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not gpu" $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu:
	PYTHONPATH=.:kernels:model $(GPU_PYTHON) -m pytest -m gpu -p no:xdist $(ARGS)

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
