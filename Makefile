# Each target does all the set-up it needs. EXTRA=gpu makes an environment for GPUs; PYTHON=... names the interpreter.
EXTRA ?= cpu
ARGS ?=
# Spinning OpenMP threads of several processes on few cores cost a factor of ten.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo windtunnel test lint format constraints

setup:
	@PYTHON="$(PYTHON)" tools/setup $(EXTRA)

demo: setup
	.venv/bin/fapo demo $(ARGS)

windtunnel: setup
	.venv/bin/fapo bench windtunnel --out runs/windtunnel $(ARGS)

# Hundreds of processes would each compile the package anew, in shells where bytecode is not written.
test: setup
	PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	tools/check_sizes

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# For plain pip; to be made anew whenever uv.lock changes (a test compares them).
constraints: setup
	tools/export_constraints
