# Two commands for a fresh machine: `make demo` draws a picture, `make test` proves the rest. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check chapter gpu lint train clean

demo: .venv/.run
	$(BIN)/sdcore generate "a yellow star above a blue square" --guidance 3 --seed 3 --out demo.png

# What CI runs: style, types, and every test that is not a long proof; as many at once as there are JOBS, a thread each.
JOBS ?= 2
test: .venv/.test lint
	$(BIN)/python -m pytest --timeout 1200 --numprocesses $(JOBS) --dist loadgroup

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The long proofs: full-size files, many mutants, the bundled model's targets. Their reports go to docs/reports/.
check: .venv/.test
	$(BIN)/python -m pytest --check -m check --timeout 7200 -s

# Every method of the chapter on the bundled model, judged: runs/chapter/report.html. Stop it as you like, the same command goes on.
chapter: .venv/.run
	$(BIN)/python -m sdcore.train.chapter

# On a machine with an NVIDIA GPU: prove and measure into kernels/results/. PART=attention (norms, unet, unet-xl, pipeline, train,
# train-lora) does one part, each under nine minutes. GPU_PYTHON=python3 takes a Python that has torch already; nothing is downloaded then.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/.test)
	$(GPU_PYTHON) -c "import sdcore.kernels" || $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(GPU_PYTHON) -m sdcore.kernels.gpu $(PART)

# The bundled model, from nothing: about two hours on two cores. Interrupt it as you like, the same command goes on.
resume = $(if $(wildcard runs/$(1)/checkpoints/step-*),--resume)
train: .venv/.run
	$(BIN)/sdcore train vae --out runs/vae --steps 8000 --close-steps 7000 --cooldown 800 $(call resume,vae)
	$(BIN)/sdcore train text --out runs/text $(call resume,text)
	$(BIN)/sdcore train text2image --vae runs/vae --text runs/text --out runs/text2image --shards 6 --steps 12000 --cooldown 3000 \
		--lr 0.0015 $(call resume,text2image)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

# k-diffusion is a reference for samplers, LyCORIS for adapters; what they ask for to train classifiers and the like is not needed.
.venv/.test: .venv/.run
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps k-diffusion lycoris-lora toml
	touch $@

clean:
	rm -rf .venv build *.egg-info
