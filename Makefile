# Everything a contributor types. Needs Python 3.11 or newer, cargo and a C compiler; the rest goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= examples/models/demo
ARGS ?=
CASES ?= 20000
TARGET ?= routing
FUZZ_SECONDS ?= 60
FAULTS ?= 100000
SEED ?= 1

VENV := .venv
PY := $(VENV)/bin/python
EXTENSION := python/orchestra/_core.abi3.so
ETCD := target/tools/etcd
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust proto -type f)
# What the tests of faults and the router bench start.
PROGRAMS := target/release/orchestra-router
PROTOS := orchestra/v1/types.proto orchestra/v1/inference.proto
RUST_LINTS := check-fmt check-clippy
# Clippy compiles what it looks at: tests need not be compiled again. The wrapper and the variable are cargo-clippy's own.
LINTED := RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__
PYTHON_LINTS := check-ruff check-mypy check-stubs check-proto check-docs check-tidy

# Coverage counters for libFuzzer. For our target alone, so that build scripts link without it.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	--cfg fuzzing -Cdebug-assertions

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint bench bench-router dist chaos soak simulate miri rdma-vm vllm fuzz gpu proto docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed $(EXTENSION) ## Install the pinned dependencies into .venv and build the extension

serve: setup ## Serve the demonstration model (MODEL=path for another, ARGS='--tp 2 …' for options)
	$(VENV)/bin/orchestra serve $(MODEL) $(ARGS)

# Two lanes: what cargo checks and compiles in debug builds fills the time in which the other's processes wait.
test: $(ETCD) ## Run every gate: lints, Rust tests, Python tests; shows all failures, then a summary
	@.ci/gates check-fmt check-rust-build check-rust-tests + build $(PYTHON_LINTS) check-tests / check-worker-tests check-python-tests

lint: ## Run the gates that execute no product code: format, clippy, ruff, mypy, stubs, drift, tidy
	@.ci/gates $(RUST_LINTS) + setup $(PYTHON_LINTS)

bench: setup ## Measure serving on this machine; benches/README.md says how to read the table
	$(PY) -m benches.serving $(ARGS)

bench-router: setup $(PROGRAMS) ## Measure the router beside its rivals and nginx (ARGS=--full for the whole grid)
	$(PY) -m benches.router $(ARGS)

dist: setup $(PROGRAMS) ## Build the router as one would ship it, with a profile of itself at work; prints where it is
	$(PY) -m benches.router.trained

chaos: setup $(PROGRAMS) ## Break engines and workers under load, 1,000 faults, every word checked (ARGS='--seed 7 …')
	$(PY) -m tests.chaos $(ARGS)

soak: setup $(PROGRAMS) ## Run the property tests on CASES random histories each, the memory's on a million steps, then half an hour of load with kills (ARGS='--minutes 5 …')
	PROPTEST_CASES=$(CASES) cargo test --release --locked -p orchestra-core -p orchestra-memory
	cargo test --release --locked -p orchestra-memory --test pool_properties --test hostile_fabric -- \
		--ignored --nocapture a_million_steps
	$(PY) -m tests.soak $(ARGS)

simulate: ## Run FAULTS faults, drawn from SEED, against the router in a simulated network; checks every token
	FAULTS=$(FAULTS) SEED=$(SEED) cargo test --release --locked -p orchestra-router --test simulation -- --nocapture

fuzz: ## Fuzz TARGET (placement, routing, stepping, waiting, wire) for FUZZ_SECONDS with libFuzzer
	RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --locked -p orchestra-fuzz --features libfuzzer --bin $(TARGET) \
		--target $(HOST) --target-dir target/fuzz
	mkdir -p target/fuzz/corpus/$(TARGET)
	target/fuzz/$(HOST)/release/$(TARGET) -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=target/fuzz/ target/fuzz/corpus/$(TARGET)

# Left out: what maps memory files, which miri does not know, and a comparison that takes it minutes.
miri: ## Run the memory crate's unit tests under miri, those that map nothing (needs nightly with miri and rust-src)
	PROPTEST_CASES=2 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --locked -p orchestra-memory --lib -- \
		--skip slab:: --skip pool:: --skip dlpack:: --skip map:: --skip a_table_comes_back --skip the_index_is

rdma-vm: setup ## Run the memory's NIXL tests over real verbs, in a QEMU guest with a soft RDMA card (Debian; 120 MB below target/)
	$(PY) -m tests.rdma_vm $(ARGS)

vllm: ## Run the test against a running vLLM: ORCHESTRA_TEST_VLLM="URL EVENTS REPLAY MODEL_FILES", block size 32, topic kv
	cargo test --locked -p orchestra-router --lib a_real_vllm -- --ignored

# The second line: tests that run everywhere, on a GPU with kernels that are compiled and steps that are recorded.
gpu: setup ## Run the tests that need an NVIDIA GPU, then measure it (ARGS='--models 1b' …)
	cargo test --locked -p orchestra-memory --test devices -- --ignored
	$(PY) -m pytest tests/worker/test_attention_triton.py tests/worker/test_row_triton.py tests/worker/test_experts.py \
	  tests/worker/test_decode_graphs.py
	$(PY) -m pytest -m gpu
	$(PY) -m benches.gpu $(ARGS)
	$(PY) -m benches.collectives --device cuda

proto: $(VENV)/.installed ## Regenerate python/orchestra/v1 from proto/
	$(call generate,python)

docs: setup ## Rewrite docs/configuration.md from the commands' own help
	$(PY) docs/generate_configuration.py

clean: ## Remove what the other targets made (.venv, target, caches)
	rm -rf $(VENV) target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis python/orchestra/_core*.so
	find python tests benches examples -name __pycache__ -type d -prune -exec rm -rf {} +

# === gates: one each, run by .ci/gates ===

.PHONY: build check-fmt check-clippy check-ruff check-mypy check-stubs check-proto check-docs check-tidy check-rust-build check-rust-tests check-worker-tests check-python-tests check-tests

# All that tests start. First what does not wait for each other: pip loads and unpacks while cargo compiles.
build:
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.installed $(PROGRAMS)
	@$(MAKE) --no-print-directory setup

check-fmt:
	cargo fmt --all --check

check-clippy:
	nice -n 10 cargo clippy --workspace --all-targets --locked --quiet -- -D warnings

check-ruff:
	$(PY) -m ruff check
	$(PY) -m ruff format --check

check-mypy:
	$(PY) -m mypy

check-stubs:
	$(PY) -m mypy.stubtest orchestra._core --mypy-config-file pyproject.toml

check-proto:
	rm -rf target/proto && mkdir -p target/proto
	$(call generate,target/proto)
	diff -r -x __init__.py -x __pycache__ target/proto/orchestra/v1 python/orchestra/v1

check-docs:
	$(PY) docs/generate_configuration.py --check

check-tidy:
	$(PY) -m pytest -q tests/test_tidy.py

# What the other lane runs has deadlines, compilers have none.
check-rust-build:
	$(LINTED) nice -n 10 cargo test --workspace --locked --quiet --no-run
	$(LINTED) nice -n 10 cargo build --workspace --locked --quiet --lib --bins --benches

check-rust-tests:
	$(LINTED) cargo test --workspace --locked --quiet --no-fail-fast

# These compute, on one or two threads each; those of check-tests wait for each other's processes, and share nothing well.
# So the ones run in either lane, whichever is free first, and the others in one of their own.
check-worker-tests:
	$(PY) -m pytest --quiet --numprocesses 2 tests/worker

check-python-tests:
	$(PY) -m pytest --quiet --numprocesses 2 tests/python

check-tests:
	$(PY) -m pytest --ignore tests/test_tidy.py --ignore tests/python --ignore tests/worker

# === how .venv comes to be ===

# pip installs nothing that is already there, so an edit of pyproject.toml costs seconds. Python compiles what it imports, of
# thousands of modules; torch's here, so that the first worker need not.
$(VENV)/.installed: pyproject.toml
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -c "$$PRINT_REQUIREMENTS" > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r $(VENV)/requirements.txt
	$(PY) -c "import torch"
	$(PY) -c "$$PRINT_TRANSFER" > $(VENV)/transfer.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r $(VENV)/transfer.txt || \
	  echo "no NIXL to be had here: its tests are skipped"
	touch $@

# cargo knows what to rebuild; this knows when there is nothing to ask it.
$(EXTENSION): $(VENV)/.installed $(RUST_SOURCES)
	PIP_QUIET=1 $(VENV)/bin/maturin develop --release --locked --quiet
	touch $@

# A real etcd for the tests: the machine's own, else Debian's package, unpacked here and not installed. Where there is
# neither, the tests that need it are skipped and say so.
$(ETCD):
	mkdir -p $(@D)/package
	if command -v etcd; then ln -s "$$(command -v etcd)" $@; else \
	  cd $(@D)/package && { apt-get download etcd-server || { apt-get update && apt-get download etcd-server; }; } && \
	  dpkg-deb --extract etcd-server_*.deb . && ln -s package/usr/bin/etcd ../etcd; fi || echo "no etcd to be had here"

# All in one call: cargo builds the same crates for all of them. It leaves alone what no edit has changed.
$(PROGRAMS): $(RUST_SOURCES) $(shell find benches/rig -type f)
	cargo build --release --locked --quiet -p orchestra-router -p orchestra-rig
	touch target/release/orchestra-router target/release/mock-engine target/release/loadgen

define PRINT_REQUIREMENTS
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras["worker"] + extras["dev"]))
endef
export PRINT_REQUIREMENTS

# Apart, because it comes without what it depends on: 69 MB instead of gigabytes of CUDA.
define PRINT_TRANSFER
import tomllib
from pathlib import Path

print("\n".join(tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]["transfer"]))
endef
export PRINT_TRANSFER

# protoc comes with grpcio-tools: none is asked of the machine.
define generate
	$(PY) -m grpc_tools.protoc -I proto \
	  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
	  --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
	$(PY) -m grpc_tools.protoc -I proto \
	  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
	  --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) orchestra/v1/inference.proto
endef
