PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint results
.DELETE_ON_ERROR:

demo: runs/demo/evaluation/table.md
	@echo
	@echo "Look at runs/demo/reward.png (the reward on prompts never trained on, rising),"
	@echo "runs/demo/evaluation/pictures-*.png (before and after, from the same noise) and table.md beside them."

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

runs/demo/evaluation/table.md: runs/demo/pipeline/model_index.json
	$(BIN)/python evaluate.py --run runs/demo --prompts toy-heldout toy-small \
		--rewards toy-alignment toy-colourfulness

# Three seeds of the demo, the benchmark and the derived memory, as committed under results/.
results: .venv/installed
	for seed in 0 1 2; do \
		$(BIN)/python train.py --preset toy --seed $$seed --output_dir runs/seed$$seed && \
		$(BIN)/python evaluate.py --run runs/seed$$seed --seed $$seed --prompts toy-heldout toy-small \
			--rewards toy-alignment toy-colourfulness && \
		mkdir -p results/toy-seed$$seed && \
		cp runs/seed$$seed/metrics.jsonl runs/seed$$seed/config.json runs/seed$$seed/evaluation/results.json \
			results/toy-seed$$seed/ || exit 1; \
	done
	$(BIN)/python toy_model.py > results/toy-limits.json
	$(BIN)/python benchmark.py --preset toy --output results/benchmark.json
	$(BIN)/python memory.py --output results/memory.json
