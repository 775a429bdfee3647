PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: runs/demo/evaluation/table.md
	@echo
	@cat runs/demo/evaluation/table.md
	@echo
	@echo "Look at runs/demo/reward.png (the reward on prompts never trained on, rising) and"
	@echo "runs/demo/evaluation/pictures-*.png (before and after, the same noise)."

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
	$(BIN)/python evaluate.py --run runs/demo --prompts toy-heldout-one toy-heldout-two toy-small \
		--rewards toy-alignment toy-colourfulness
