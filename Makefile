# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs in .venv by itself.
#   make demo    find a face with pretrained weights, then train on handwritten digits
#   make test    run the tests
#   make lint    ruff, mypy, clang-format and clang-tidy
#   make clean   remove .venv and everything that was built

# What a person's shell has set must not leak into .venv.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

BUILD := pyproject.toml .ci/setup_env.sh $(shell find ffi -type f)
PYTHON_IN := .venv/bin/python

.PHONY: help demo test lint clean
help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

.venv/.stamp-%: $(BUILD)
	@sh .ci/setup_env.sh $*
	@touch $@

demo: .venv/.stamp-demo
	$(PYTHON_IN) examples/detect_faces.py
	$(PYTHON_IN) examples/train_digits.py

test: .venv/.stamp-test
	@# The tests of a file stay together: some share what is expensive to set up.
	$(PYTHON_IN) -m pytest -q -n 2 --dist loadscope tests

lint: .venv/.stamp-dev
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	@ln -sfn ../tuner jaxwin/tuner  # mypy does not follow an editable install's import hook
	$(PYTHON_IN) -m mypy
	.ci/lint_cpp.sh

clean:
	rm -rf .venv build dist jaxwin/tuner examples/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
