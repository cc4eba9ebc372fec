# make report   install once, execute the notebooks, build the site      make test   install once, run every check
# make lab      open JupyterLab                                            make clean  remove what make made
#
# SCALE=auto|smoke|cpu|full   auto: full on a CUDA GPU, else cpu.   MACHINE=local   where results go: artifacts/MACHINE, book/MACHINE
# PYTHON=python3              what the environment is made with: 3.11 or newer

PYTHON ?= python3
SCALE ?= auto
MACHINE ?= local

# torch.compile on a CPU takes the C++ compiler to know the CPU's vector instructions: else it tries each, for 8 s in all.
export TORCHINDUCTOR_VEC_ISA_OK ?= 1
# Threads that spin while they wait take each other's core on a busy machine.
export GOMP_SPINCOUNT ?= 1000

BIN := .venv/bin
INSTALLED := .venv/.installed
SITE := book/_build/html/index.html
NOTEBOOKS := $(shell cat notebooks/report.txt)
EXECUTED := $(NOTEBOOKS:%=book/$(MACHINE)/%.ipynb)
SOURCES := $(shell find lmsys -name '*.py' -o -name '*.json' -o -name '*.toml' -o -name '*.cu')
PAGES := README.md _config.yml _toc.yml $(shell find book artifacts -path book/_build -prune -o -path book/local -prune -o -type f -print)

.PHONY: report test lab clean

report: $(SITE)
	@echo "The site is at $(SITE)"

$(SITE): $(EXECUTED) $(PAGES)
	$(BIN)/python -m lmsys report $(or $(STALE),--site_only) --scale $(SCALE) --machine $(MACHINE)
	@touch $@

# What is out of date is noted here, and executed above by one process, one notebook at a time: they measure, and would
# disturb each other. One that fails is executed again the next time.
book/$(MACHINE)/%.ipynb: notebooks/%.ipynb $(SOURCES) | $(INSTALLED)
	$(eval STALE += $*)@:

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'lmsys needs Python 3.11 or newer, this is %s: make PYTHON=python3.12 ...' % sys.version.split()[0])"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Tests write to a folder of their own, so that they neither see nor touch results.
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && export LMSYS_OUTPUT="$$scratch" WANDB_MODE=offline && \
	$(BIN)/pytest tests --numprocesses 2 --dist loadfile && \
	LMSYS_SCALE=smoke PYTHONPATH=tests $(BIN)/pytest --nbmake --nbmake-timeout=300 --numprocesses 2 -p own_outputs notebooks && \
	$(BIN)/jupyter-book build book -W -n --keep-going --quiet --path-output "$$scratch/site"

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)  # root, in a container, is refused without

clean:
	rm -rf .venv book/_build book/local artifacts/local runs
