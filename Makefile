# Every target sets up .venv by itself, once: it is made again only when pyproject.toml or constraints.txt change.
#
#   make PYTHON=python3.12 test    which Python makes .venv (3.11 or newer); an existing .venv is kept
#   make test ARGS="-k slots"      what goes to pytest
#   make test TORCH=1              installs torch as well and runs its tests

PYTHON ?= python3
ARGS ?=
TORCH_PIN := torch==2.13.0

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

.PHONY: help demo live test lint types format bench bench-live soak soak-live clean

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

bench: $(DEV)  ## measure this machine: bare echo, worker, whole chain
	@.venv/bin/python -m benchmarks $(ARGS)

bench-live: $(DEV)  ## live streams: CPU a frame against the floor, latency, how many at once
	@.venv/bin/python -m benchmarks.bench_live $(ARGS)

soak: $(DEV)  ## ten minutes of jobs, then compare the memory
	@.venv/bin/python -m benchmarks --soak 10 $(ARGS)

soak-live: $(DEV)  ## an hour of streams that start, stop and fail at random; is anything left over?
	@.venv/bin/python -m benchmarks.soak_live $(ARGS)

clean:  ## remove what make made, .venv included
	@rm -rf .venv build dist demo-out live-out bench-out .pytest_cache .mypy_cache .ruff_cache .hypothesis gpu_byoc.egg-info
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

comma := ,
