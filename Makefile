PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint results
.DELETE_ON_ERROR:

EVALUATE := --prompts toy-small toy-heldout-one toy-heldout-two --rewards toy-alignment toy-colourfulness --checkpoints

demo: runs/demo/evaluation/report.html
	@echo
	@echo "Open runs/demo/evaluation/report.html: the rewards on prompts never trained on, the curves, and pictures"
	@echo "before and after from the same noise."

test: .venv/installed
	$(BIN)/python -m pytest -q tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

runs/demo/pipeline/model_index.json: | .venv/installed
	$(BIN)/python train.py $(if $(wildcard runs/demo/checkpoints),--resume runs/demo,--preset toy --output_dir runs/demo)

runs/demo/evaluation/report.html: runs/demo/pipeline/model_index.json
	$(BIN)/python evaluate.py --run runs/demo $(EVALUATE)

# Three seeds of the demo, the benchmark and the derived memory, as committed under results/.
results: .venv/installed
	for seed in 0 1 2; do \
		$(BIN)/python train.py --preset toy --seed $$seed --output_dir runs/seed$$seed && \
		$(BIN)/python evaluate.py --run runs/seed$$seed --seed $$seed $(EVALUATE) && \
		mkdir -p results/toy-seed$$seed && \
		cp runs/seed$$seed/metrics.jsonl runs/seed$$seed/config.json runs/seed$$seed/evaluation/results.json \
			results/toy-seed$$seed/ || exit 1; \
	done
	$(BIN)/python -m benchmarks.limits > results/toy-limits.json
	$(BIN)/python -m benchmarks.speed --preset toy --output results/benchmark.json
	$(BIN)/python -m benchmarks.memory --output results/memory.json
