# make demo   run the main job on the embedded default: clips, tiny model, cold start, GRPO, report
# make test   the test suite (creates .venv on first use)
# make test-peers  the tests that compare with TRL and Liger (creates .venv-bench)
# make lint   ruff check and ruff format --check
# make gpu    GPU tests and benchmarks, in the Python that is given by GPU_PYTHON (default: the current python3)
# make clean  remove what this file made

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-peers lint venv gpu clean

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

# the same values as TRL and Liger, in an environment that has them
test-peers: .venv-bench/.installed
	.venv-bench/bin/python -m pytest -p no:xdist -m "not gpu" tests/grpo_kernels/test_peers.py \
		tests/grpo_core/test_losses_trl.py tests/recipes/test_fused_head_examples.py tests/test_bench.py

.venv-bench/.installed: setup.py constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch triton
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[affectgpt,dev,bench]'
	touch $@

# stages, most valuable first, each with its own time limit; logs and figures go to gpu_round/ (ARGS="--out DIR")
gpu:
	PYTHONPATH=.:kernels:model $(GPU_PYTHON) bench/gpu_round.py $(ARGS)

clean:
	rm -rf .venv .venv-bench *.egg-info .pytest_cache .ruff_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
