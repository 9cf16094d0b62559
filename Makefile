# Needs only python3 >= 3.11, a C++ compiler and, the first time, the package index.
#
#   make demo                                   pictures, curves and a table of the shipped models, in out/
#   make test, make lint, make types            what .ci/run runs
#   make docs                                   it runs that too: the site, to build/site/
#   make bench                                  benchmarks, to bench/results/
#   make gpu                                    on a GPU: gpu-native builds, gpu-test tests what is marked gpu,
#                                               gpu-measure measures, to bench/results/gpu.json; gpu-sanitize is apart;
#                                               GPU_PYTHON=python3 takes an environment that has torch and triton;
#                                               GPU_WORKERS=0 tests in one process, GPU_SECONDS=300 to measure in
#   make clean, make distclean                  remove what was built; and the environment .venv too
#
#   make demo PYTHON=python3.12                 another interpreter for a new .venv
#   make demo TORCH_INDEX_URL=                  torch from pip's own index (Linux: with CUDA, several GB)
#   make demo PIP_FLAGS='--index-url URL'       options for every pip install
#   make test PYTEST_FLAGS='-k solve -x'         also BENCH_FLAGS, DEMO_FLAGS; TEST_WORKERS=4 processes, 0 for none

PYTHON ?= python3
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
PIP_FLAGS ?=
PYTEST_FLAGS ?=
TEST_WORKERS ?= auto
BENCH_FLAGS ?=
DEMO_FLAGS ?=
GPU_PYTHON ?= $(PY)
GPU_OUT ?= bench/results/gpu.json
GPU_WORKERS ?= 4
GPU_SECONDS ?= 300
GPU_COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
GPU_FLAGS ?=
BENCH_OUT ?= bench/results/latest.json
GPU_REPORT = --tb=short -rfE --junitxml=$(basename $(GPU_OUT))
SANITIZED := tests/ops/test_cuda.py::test_a_sanitizer_finds_nothing

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
BUILD_REQUIRES = $$($(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'])")
RECIPES := pyproject.toml setup.py constraints.txt
CPP_SOURCES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/ops/*.cpp)

.PHONY: help demo test lint types docs bench native clean distclean
.PHONY: gpu gpu-native gpu-test gpu-measure gpu-sanitize
.DELETE_ON_ERROR:

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo native
	$(VENV)/bin/deqkern demo --out out $(DEMO_FLAGS)

test: $(VENV)/.installed-dev native
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

types: $(VENV)/.installed-dev
	$(PY) -m mypy deqkern

# A warning is an error, unless --quiet hides it. The variable silences an advertisement.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/.installed-dev native
	mkdir -p $(dir $(BENCH_OUT))
	$(PY) -m pytest bench --benchmark-json=$(BENCH_OUT) $(BENCH_FLAGS)

# About 9 minutes at most. It installs nothing. A test that fails or hangs does not keep it from measuring.
gpu:
	$(MAKE) gpu-native
	$(MAKE) gpu-test; tested=$$?; $(MAKE) gpu-measure && exit $$tested

gpu gpu-native gpu-test gpu-measure gpu-sanitize: export PATH := $(PATH):/usr/local/cuda/bin
gpu gpu-native gpu-test gpu-measure gpu-sanitize: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# By CMake itself: nothing of setuptools, whose version there may be too old for pyproject.toml.
gpu-native:
	cmake -S . -B build/gpu -G Ninja -DDEQKERN_CUDA=ON \
	  -DPython_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(GPU_PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/gpu
	cmake --install build/gpu --prefix deqkern

# INT, not TERM: pytest then says what failed and where it was.
gpu-test:
	timeout -s INT -k 20 200 $(GPU_PYTHON) -m pytest -q -m gpu -n $(GPU_WORKERS) --dist loadfile $(GPU_REPORT)-tests.xml \
	  --deselect $(SANITIZED) $(PYTEST_FLAGS)

gpu-measure:
	timeout -k 10 $$(($(GPU_SECONDS) + 60)) $(GPU_PYTHON) bench/gpu.py --seconds $(GPU_SECONDS) --out $(GPU_OUT) \
	  --commit "$(GPU_COMMIT)" $(GPU_FLAGS)

gpu-sanitize:
	timeout -s INT -k 20 400 $(GPU_PYTHON) -m pytest -q -m gpu -n 0 $(GPU_REPORT)-sanitizer.xml $(SANITIZED)

# deqkern._C, where the sources import it from; half a second when nothing has changed.
native: | $(VENV)/.installed-demo
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace > build/native.log 2>&1 || { cat build/native.log; exit 1; }

$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-dev: EXTRAS := demo,triton,test,dev
$(VENV)/.installed-docs: EXTRAS := docs
$(VENV)/.installed-dev: $(VENV)/.installed-demo

# What is installed already is left alone, and then pip asks no index.
$(VENV)/.installed-%: $(RECIPES) | $(PY)
	@echo "installing deqkern[$(EXTRAS)] into $(VENV), some minutes the first time"
	$(PIP_INSTALL) $(TORCH_INDEX) torch
	$(PIP_INSTALL) $(BUILD_REQUIRES)
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deqkern needs Python >= 3.11; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf build dist out *.egg-info deqkern/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
