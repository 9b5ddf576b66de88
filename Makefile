# make demo   run the main job on the embedded default: clips, tiny model, cold start, GRPO, report
# make test   the test suite (creates .venv on first use), without the tests marked `long`
# make test-long   the tests that take more than a minute each
# make test-peers  the tests that compare with TRL and Liger (creates .venv-bench)
# make lint   ruff check, ruff format --check, and mypy
# make dist-check  build sdist and wheel, install the wheel into a fresh environment, and use it there
# make docs   the documentation's pages, in site/ (creates .venv-docs)
# make gpu    GPU tests and benchmarks, in the Python that is given by GPU_PYTHON (default: the current python3)
# make clean  remove what this file made, except runs: what a run wrote is its user's

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long test-peers lint dist-check docs venv gpu clean

venv: .venv/.installed

# torch first and pinned: a range would let pip choose another build
.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) torch triton
	$(BIN)/$(PIP_INSTALL) --editable '.[affectgpt,dev]'
	touch $@

demo: venv
	$(BIN)/python recipes/affectgpt_r1.py $(ARGS)

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not gpu and not long" $(ARGS)

# pytest exits with 5 where no test is selected, which is no failure here
test-long: venv
	$(BIN)/python -m pytest -p no:xdist -m "long and not gpu" $(ARGS) || test $$? -eq 5

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist-check: venv
	$(BIN)/python .ci/check_dist.py

# the same values as TRL and Liger, in an environment that has them
test-peers: .venv-bench/.installed
	.venv-bench/bin/python -m pytest -p no:xdist -m "not gpu" tests/grpo_kernels/test_peers.py \
		tests/grpo_core/algorithm/test_losses_trl.py tests/recipes/test_fused_head_examples.py tests/test_bench.py

.venv-bench/.installed: setup.py constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/$(PIP_INSTALL) torch triton
	.venv-bench/bin/$(PIP_INSTALL) --editable '.[affectgpt,dev,bench]'
	touch $@

# an environment of its own, without torch: API pages are made from the source, which is read and not imported
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# what the extra `docs` in setup.py names, without the package and its dependencies
.venv-docs/.installed: setup.py constraints.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(PIP_INSTALL) mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# stages, most valuable first, each with its own time limit; logs and figures go to gpu_round/ (ARGS="--out DIR")
gpu:
	PYTHONPATH=.:kernels:model $(GPU_PYTHON) bench/gpu_round.py $(ARGS)

clean:
	rm -rf .venv .venv-bench .venv-docs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
