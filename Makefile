# Every target sets up .venv by itself, once: it is made again only when pyproject.toml or constraints.txt change.
#
#   make PYTHON=python3.12 test    which Python makes .venv (3.11 or newer); an existing .venv is kept
#   make test ARGS="-k slots"      what goes to pytest
#   make test TORCH=1              installs torch as well and runs its tests
#   make images-test STANDIN=1     where no registry answers, a base image of Debian's packages instead (root, debootstrap)

PYTHON ?= python3
ARGS ?=
FUZZ_SECONDS ?= 60
CHAOS_ROUNDS ?= 3
CHAOS := tests/chaos tests/local/test_ledger_faults.py tests/local/test_attached.py tests/engine/test_watch.py tests/system/test_stream_process.py
TORCH_PIN := torch==2.13.0
TOOL_PINS := cyclonedx-bom==7.5.0 uv==0.13.9
IMAGES ?= cpu
BASE ?= docker.io/library/python:3.11-slim-bookworm

SHELL := /bin/sh
.SHELLFLAGS := -euc
.ONESHELL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# A stamp's name holds a digest of what was installed from, and of where: a file that was only touched installs
# nothing; a changed pin does, and so does a moved checkout, whose scripts would point elsewhere. A .venv whose Python is
# gone or was replaced by another version loses its stamps here.
$(shell [ ! -d .venv ] || .venv/bin/python -c 'import pip' 2>/dev/null || rm -f .venv/.[a-z]*-*)
HERE := $(shell pwd | sha256sum | cut -c1-12)
PINS := $(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-12)
VENV := .venv/.made-$(HERE)
RUN := .venv/.run-$(HERE)-$(PINS)
DEV := .venv/.dev-$(HERE)-$(PINS)
WITH_TORCH := .venv/.torch-$(HERE)-$(PINS)
TOOLS := .venv/.tools-$(HERE)
TEST_NEEDS := $(DEV) $(if $(filter 1,$(TORCH)),$(WITH_TORCH))

# pip speaks only when it fails.
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input install --constraint constraints.txt
define quietly
	log=.venv/install.log
	if ! { $(1) ; } >"$$log" 2>&1; then
		tail -n 25 "$$log" >&2
		echo "make: the installation failed; the whole output is in $$log" >&2
		exit 1
	fi
endef

.PHONY: help demo live test lint types format bench bench-quick bench-peers plot bench-live gpu-first soak soak-live fuzz chaos images images-test images-test-gpu sbom lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(RUN)  ## a job's whole way on real video: client, gateway, orchestrator, worker and back
	@.venv/bin/gpu-byoc demo $(ARGS)

live: $(RUN)  ## a live stream of real video with its sound, in real time; leaves an MP4 and a sheet of frames
	@.venv/bin/gpu-byoc stream $(ARGS)

test: $(TEST_NEEDS)  ## the tests (TORCH=1: those of torch too; ARGS="..." goes to pytest)
	@$(if $(filter 1,$(TORCH)),GPU_BYOC_REQUIRE_TORCH=1) .venv/bin/python -m pytest $(ARGS)

lint: $(DEV)  ## ruff: rules and format
	@.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: $(DEV)  ## mypy, strict
	@.venv/bin/python -m mypy

format: $(DEV)  ## let ruff format and sort
	@.venv/bin/python -m ruff check --fix-only --quiet .
	.venv/bin/python -m ruff format .

bench: $(DEV)  ## measure this machine, everything it can run; leaves figures, pictures and a page in bench-out/
	@.venv/bin/gpu-byoc bench $(ARGS)

bench-quick: $(DEV)  ## the same with few and short windows: a look, under two minutes
	@.venv/bin/gpu-byoc bench --quick $(ARGS)

bench-peers: $(DEV)  ## other servers on the same work, each in an environment of its own under .venv-peers/
	@.venv/bin/gpu-byoc bench --only peers-live,peers-jobs $(ARGS)

plot: $(DEV)  ## README's table and picture again: make plot FILE=benchmarks/results/MACHINE.json
	@.venv/bin/python -m benchmarks report "$(FILE)" --readme README.md $(ARGS)

bench-live: $(DEV)  ## live streams: CPU a frame against the floor, latency, how many at once
	@.venv/bin/gpu-byoc bench --only live $(ARGS)

gpu-first: $(if $(GPU_PYTHON),,$(DEV))  ## on a GPU that is there for ten minutes: right or not, how fast; logs in gpu-out/ (benchmarks/README.md)
	@PYTHON="$(or $(GPU_PYTHON),$(CURDIR)/.venv/bin/python)" sh benchmarks/gpu_first.sh $(or $(ARGS),gpu-out)

soak: $(DEV)  ## ten minutes of jobs, then compare the memory
	@.venv/bin/python -m benchmarks.soak $(ARGS)

soak-live: $(DEV)  ## an hour of streams that start, stop and fail at random; is anything left over?
	@.venv/bin/python -m benchmarks.soak_live $(ARGS)

fuzz: $(DEV)  ## hostile input, FUZZ_SECONDS=60 for each target: no crash, no hang, no growth; ARGS="ts worker" for some
	@.venv/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

chaos: $(DEV)  ## things that die, hang, lie and go missing, CHAOS_ROUNDS=3 times over (docs/chaos.md)
	@CHAOS_ROUNDS=$(CHAOS_ROUNDS) .venv/bin/python -m pytest $(CHAOS) $(ARGS)

images: $(VENV)  ## container images, with docker or podman: make images IMAGES="cpu cupy torch full" BASE=...@sha256:...
	@.venv/bin/python docker/images.py build $(IMAGES) --base "$(BASE)" $(if $(filter 1,$(STANDIN)),--standin)

images-test: $(DEV)  ## build the images of IMAGES="..." (cpu), run them, and check what docs/docker.md says of them
	@.venv/bin/python docker/images.py build $(IMAGES) --base "$(BASE)" $(if $(filter 1,$(STANDIN)),--standin)
	$(if $(filter cpu,$(IMAGES)),GPU_BYOC_TEST_IMAGE=gpu-byoc:cpu .venv/bin/python -m pytest tests/images $(ARGS))
	for target in $(filter-out cpu,$(IMAGES)); do
		image=gpu-byoc:cuda-$$target
		[ $$target != full ] || image=gpu-byoc:cuda
		GPU_BYOC_TEST_CUDA_IMAGE=$$image .venv/bin/python -m pytest tests/images/test_cuda_containers.py $(ARGS)
	done

images-test-gpu: $(DEV)  ## on a host with a GPU: build the full CUDA image, verify the backends and measure inside it
	@.venv/bin/python docker/images.py build cpu full --base "$(BASE)"
	GPU_BYOC_TEST_CUDA_IMAGE=gpu-byoc:cuda GPU_BYOC_TEST_GPU=1 \
		.venv/bin/python -m pytest tests/images/test_cuda_containers.py -s $(ARGS)

sbom: $(TOOLS)  ## what is in each image, as CycloneDX, from the locks: dist/sbom-*.cdx.json
	@mkdir -p dist
	awk '/==/ { keep = !seen[$$1]++ } keep' docker/cpu.lock docker/torch.lock docker/cupy.lock >.venv/full.lock
	cat docker/cpu.lock docker/cupy.lock >.venv/cupy.lock
	cat docker/cpu.lock docker/torch.lock >.venv/torch.lock
	cp docker/cpu.lock .venv/cpu.lock
	for image in cpu cupy torch full; do
		.venv/tools/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
			-o "dist/sbom-$$image.cdx.json" ".venv/$$image.lock"
		echo "dist/sbom-$$image.cdx.json"
	done

lock: $(TOOLS)  ## the images' locks again, from pyproject.toml, constraints.txt and docker/cuda-pins.txt
	@grep -v '^torch==' constraints.txt >.venv/run.txt
	compile() { .venv/tools/bin/uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 "$$@"; }
	echo setuptools | compile --no-deps -c .venv/run.txt -o docker/build.lock -
	compile -c .venv/run.txt -o docker/cpu.lock pyproject.toml
	skip=$$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' docker/cpu.lock)
	for extra in cupy torch; do
		compile --extra $$extra -c .venv/run.txt -c docker/cuda-pins.txt $$skip -o docker/$$extra.lock pyproject.toml
	done

clean:  ## remove what make made, .venv included
	@rm -rf .venv .venv-peers build dist demo-out live-out bench-out gpu-out fuzz-out .pytest_cache .mypy_cache .ruff_cache .hypothesis gpu_byoc.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	@if ! command -v "$(PYTHON)" >/dev/null; then
		echo "make: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2
		exit 1
	fi
	if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), and 3.11 is needed; name a newer one: make PYTHON=python3.12" >&2
		exit 1
	fi
	if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then
		echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2
		exit 1
	fi
	echo "Setting up .venv with $$("$(PYTHON)" -V); once, about a minute."
	"$(PYTHON)" -m venv --clear .venv
	$(call quietly,$(PIP) setuptools)
	touch "$@"

$(RUN): | $(VENV)
	@$(call quietly,$(PIP) --no-build-isolation --editable ".[page]")
	rm -f .venv/.run-*
	touch "$@"

$(DEV): | $(RUN)
	@$(call quietly,$(PIP) --no-build-isolation --editable ".[dev$(comma)bench$(comma)page]")
	rm -f .venv/.dev-*
	touch "$@"

$(WITH_TORCH): | $(DEV)
	@echo "Installing $(TORCH_PIN); it is large."
	$(call quietly,$(PIP) $(TORCH_PIN))
	rm -f .venv/.torch-*
	touch "$@"

# In an environment of their own: what they need is not to mix with what the project needs.
$(TOOLS): | $(VENV)
	@.venv/bin/python -m venv --clear .venv/tools
	$(call quietly,.venv/tools/bin/python -m pip --disable-pip-version-check --no-input install $(TOOL_PINS))
	touch "$@"

comma := ,
