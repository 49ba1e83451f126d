# make demo   set up .venv and train digits with 40 labels, supervised only and with MixMatch
# make test   set up .venv and run the tests
# make check  lint, format and types
# make docs   build the documents and the API reference in build/site
# make package  use pip install . and the wheel in clean environments
# make gpu    all that wants a CUDA device: tests, checks and measurements
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(RUN)/gpu-mixmatch demo

# Two processes of one thread each: the tensors are small, and threads would wait for each other.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed
	$(RUN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy gpu_mixmatch

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q -c constraints.txt torch
	$(RUN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# What the documents show of training: runs all of it again, about a quarter of an hour on 2 cores.
# FASHION is the folder of Fashion-MNIST's IDX files. One thread: the images are small, and the
# last digits depend on the number of threads.
FASHION ?= /usr/share/datasets/fashion-mnist
.PHONY: results
results: export OMP_NUM_THREADS = 1
results: $(VENV)/.installed
	rm -rf runs/results
	$(RUN)/gpu-mixmatch demo --out runs/results/digits-demo
	$(RUN)/gpu-mixmatch ablate --out runs/results/digits-ablation
	$(RUN)/gpu-mixmatch demo --dataset fashion-mnist --root $(FASHION) --labels 100 --steps 4000 --seeds 0 --out runs/results/fashion-mnist-demo
	$(RUN)/python -m benchmarks.tiles runs/results/tiles
	$(RUN)/gpu-mixmatch demo --dataset folder --root runs/results/tiles --labels 24 --out runs/results/tiles-demo
	$(RUN)/python -m benchmarks.tiles --textures runs/results/textures
	$(RUN)/gpu-mixmatch demo --dataset folder --root runs/results/textures --labels 28 --out runs/results/textures-demo
	mkdir -p runs/results/digits-preview
	$(RUN)/gpu-mixmatch preview --out runs/results/digits-preview/preview.png
	$(RUN)/python -m benchmarks.report --collect runs/results
	$(RUN)/python -m benchmarks.op_grid

# Many short runs, hours of them: what the defaults of short runs were chosen by. Each finished run
# is kept in runs/learning and not trained again.
.PHONY: learning
learning: export OMP_NUM_THREADS = 1
learning: $(VENV)/.installed
	$(RUN)/python -m benchmarks.learning --fashion $(FASHION)
	$(RUN)/python -m benchmarks.methods --fashion $(FASHION)
	$(RUN)/python -m benchmarks.report

# Everything that wants a CUDA device, within nine minutes: predictions beside what is measured,
# tests, suites. Results go to $$OUT, if it is set.
.PHONY: gpu
gpu: $(VENV)/.installed
	$(RUN)/python -m benchmarks.gpu

# What the documents show of speed, and what they promise of it; suites set their own threads.
.PHONY: benchmarks
benchmarks: $(VENV)/.installed
	for suite in augment strong batch loader scaling ops orders claims kernels; do $(RUN)/python -m benchmarks.$$suite || exit 1; done
	$(RUN)/python -m benchmarks.report

# The kernels under the oldest Triton that they are held to. Its interpreter needs a numpy before
# 2.4, and numpy warns of what it does there.
TRITON36 = .venv-triton36
.PHONY: test-triton36
test-triton36: $(TRITON36)/.installed
	$(TRITON36)/bin/python -m pytest -W "ignore:Conversion of an array:DeprecationWarning" \
	  tests/test_triton.py tests/test_ops.py tests/test_kernels.py tests/test_launcher.py

$(TRITON36)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/python -m pip install -q -c constraints.txt torch pytest numba
	$(TRITON36)/bin/python -m pip install -q triton==3.6.0 "numpy>=2,<2.4"
	touch $@

# Documents and API reference as a site in build/site, from links to what they point to.
PAGES = README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE docs examples benchmarks tests gpu_mixmatch
.PHONY: docs package
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed
	rm -rf build/pages && mkdir -p build/pages
	ln -s $(PAGES:%=../../%) build/pages
	$(RUN)/mkdocs build --strict

# pip install . and the wheel, each used in a clean environment.
package:
	PYTHON=$(PYTHON) .ci/package
