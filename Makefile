# Two commands matter: `make cook` walks the whole path, `make test` checks everything.
#   make cook PROFILE=tiny                                  # two minutes, random weights
#   make cook SET="sft.learning_rate=2e-4 sft.max_steps=20" # override any setting
# pip's own variables pick another index (they reach pip through the environment):
#   make cook PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   # torch without CUDA packages
#   make cook PIP_INDEX_URL=https://mirror.example/simple                # a company mirror
#   make cook PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels                  # a room without network: first `make wheels`

PYTHON  ?= python3
PROFILE ?= laptop
SET     ?=
export DSC_PROFILE = $(PROFILE)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN    := .venv/bin
EXTRAS := quant,serve,data,augment,reward,safety,track,docs,dev
READY  := .venv/.installed
# `cook` chooses its threads from the load of the moment; other programs get what suits it as variables.
THREADS = eval "$$($(BIN)/deepseek-cookbook threads)"

.PHONY: cook test docs lab save bench bench-ppo lint wheels lock clean
.DELETE_ON_ERROR:

cook: $(READY)
	@$(BIN)/deepseek-cookbook cook --profile $(PROFILE) $(SET)

# The tests of a file share its fixtures, so they stay in one worker.
test: $(READY)
	@$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

docs: $(READY)
	@$(BIN)/python scripts/build_docs.py

lab: $(READY)
	@$(THREADS); $(BIN)/jupyter lab nbs

save: $(READY)
	@$(BIN)/python scripts/save_notebooks.py $(NB)

bench: $(READY)
	@$(THREADS); $(BIN)/python scripts/bench/sft.py --steps 40
	@$(THREADS); $(BIN)/python scripts/bench/packing.py
	@$(THREADS); $(BIN)/python scripts/bench/precision.py --steps 24
	@$(THREADS); $(BIN)/python scripts/bench/clean.py

# Beside TRL 1.12.0, the last one with a PPO trainer, in an environment of its own: .venv-trl112.
bench-ppo: $(READY)
	@$(BIN)/python scripts/bench/ppo.py
	@$(BIN)/python scripts/bench/ppo_baselines.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/python scripts/check_notebooks.py

wheels:
	@$(PYTHON) scripts/install.py --wheels wheels --extras $(EXTRAS)

lock: $(READY)
	@$(BIN)/python scripts/install.py --lock

clean:
	rm -rf .venv .venv-trl112 _docs _site dist build

$(READY): pyproject.toml constraints.txt scripts/install.py
	@$(PYTHON) scripts/install.py --extras $(EXTRAS)
