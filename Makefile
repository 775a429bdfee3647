PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu lint results
.DELETE_ON_ERROR:

EVALUATE := --prompts toy-small toy-heldout-one toy-heldout-two --rewards toy-alignment toy-colourfulness --checkpoints
GUIDED := --guidance_scale 3

demo: runs/demo/evaluation/report.html

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-gpu: .venv/installed
	$(BIN)/python -m pytest -q -s -m gpu tests/test_gpu.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

runs/demo/pipeline/model_index.json: | .venv/installed
	$(BIN)/python train.py --preset toy --output_dir runs/demo

runs/demo/evaluation/report.html: runs/demo/pipeline/model_index.json
	$(BIN)/python evaluate.py --runs runs/demo $(EVALUATE)

# Three seeds of the demo, and three that start from the guidance that suits the base best, as committed under results/.
results: .venv/installed
	for seed in 0 1 2; do \
		for name in toy guided; do \
			run=runs/$$name-seed$$seed; \
			$(BIN)/python train.py --preset toy --seed $$seed --output_dir $$run $$(test $$name = toy || echo $(GUIDED)) && \
			$(BIN)/python evaluate.py --runs $$run --seed $$seed $(EVALUATE) && \
			mkdir -p results/$$name-seed$$seed && \
			cp $$run/metrics.jsonl $$run/config.json $$run/evaluation/results.json results/$$name-seed$$seed/ || exit 1; \
		done; \
		$(BIN)/python -m benchmarks.card --model runs/toy-seed$$seed/pipeline --num_steps 5 \
			--output results/toy-seed$$seed/card.json || exit 1; \
	done
	$(BIN)/python evaluate.py --models base=toy finetuned=runs/toy-seed0 --prompts toy-heldout:24 --rewards toy-alignment \
		--images_per_prompt 1 --num_steps 5 --guidance_scale 1 --output_dir runs/pictures
	cp runs/pictures/pictures-toy-heldout%3A24.png results/demo-pictures.png
	cp runs/toy-seed0/reward.png results/demo-curve.png
	$(BIN)/python -m benchmarks.card --output results/miniature.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.card --num_steps 5 --output results/miniature-one-thread.json
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m benchmarks.card --num_steps 5 --output results/miniature-no-avx.json
	$(BIN)/python -m benchmarks.speed --preset toy --processes 1 2 --also "--log_prob_batch_size 128 --train_batch_size 128" \
		"--channels_last True" "--compile True" --output results/benchmark.json
	$(BIN)/python -m benchmarks.memory --output results/memory.json
