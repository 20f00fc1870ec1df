"""Packaging. Ranges say what should work; constraints.txt says what was tested, and `make` installs exactly that."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

REQUIRED = [
    "torch>=2.11,<3",  # tensors, autograd, compile, distributed
    "transformers>=5.20,<6",  # the subjects: every causal LM comes from here
    "huggingface_hub>=1.33,<3",  # revisions and files of models of the hub, and what of them is cached
    "tokenizers>=0.23.1,<1",  # byte-level BPE of the tiny models
    "safetensors>=0.8,<1",  # weights on disk, read without executing them
    "datasets>=5,<6",  # text from the hub or local files; pretokenized corpora
    "pyarrow>=21",  # activation shards: Arrow IPC with zstd, memory-mapped
    "numpy>=2,<3",  # row-wise metrics and shard planes
    "omegaconf>=2.4,<3",  # typed configuration merged from files and arguments
    "tqdm>=4.66.3,<5",  # progress bars
    "fsspec>=2025.3",  # dumps on remote disks (datasets pins it further)
    "zstandard>=0.23,<1",  # compressed corpora, read as streams
    "xxhash>=3.5",  # checksums of shards and fingerprints
    "peft>=0.21,<1",  # LoRA adapters on the shared base
    "accelerate>=1.1,<2",  # models whose weights are not there yet (peft needs it too)
    "wandb>=0.31,<1",  # curves and tables of a run, offline by default
]
DEEPSPEED = [
    "deepspeed>=0.19,<1",  # ZeRO 0-3 and offload
    "pydantic>=2.12.5,<3",  # DeepSpeed's own complaints of a file, told as ours
    "psutil>=6.1,<8",  # the ranks that DeepSpeed's launcher has started, to be stopped with it
    "ninja>=1.11.1",  # builds DeepSpeed's CPU collective and optimizer on first use
]
DEMO = [
    "gguf>=0.17,<1",  # reads the packaged SmolLM2 weights
]
SWEEPS = [
    "optuna>=5,<6",  # offline sweeps: Gaussian process, TPE, successive halving, shared state in SQLite
    "scipy>=1.15,<2",  # Optuna's Gaussian process
]
SERVE = [
    "starlette>=1,<2",  # routes and responses of the server
    "uvicorn>=0.40,<1",  # speaks HTTP for it
    "pydantic>=2.12.5,<3",  # what requests hold, checked
]
TRITON = [
    "triton>=3.6,<4; platform_system=='Linux'",  # GPU kernels; their tests need it on a CPU too (interpreter, ahead-of-time compiler)
]
DEV = [
    "pytest>=9,<10",  # the tests
    "pytest-xdist>=3.8,<4",  # one test process per core
    "hypothesis>=6.155,<7",  # property tests: inputs of any shape
    "ruff>=0.17,<0.18",  # lint and format; minor versions change the rules
    "import-linter>=2.17,<3",  # rooms import only what lies below them
    "mypy>=2.4,<3",  # types of the package
    "sweeps>=0.2,<0.3",  # W&B's own schema of sweep files; 0.3 wants NumPy 1
]

VERSION = re.search(r'^__version__ = "(.+?)"', (HERE / "megalens" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]


class BuildWithFiles(build_py):
    """Copies into a wheel what a checkout has beside the package (megalens/shipped.py finds either)."""

    def run(self):
        super().run()
        for folder in () if self.editable_mode else ("conf", "ds_configs"):
            shutil.copytree(HERE / folder, Path(self.build_lib, "megalens", "_files", folder), dirs_exist_ok=True)


setup(
    name="megalens",
    version=VERSION,
    description="Consistency lenses: read an activation of a language model, say it in words, prove the words by rebuilding it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megalens", "megalens.*"]),
    package_data={
        "megalens": ["py.typed"],
        "megalens.ops": ["cpu/*"],
        "megalens.data": ["demo_wheels.txt"],
        "megalens.page": ["*.js", "*.css", "*.html"],
    },
    cmdclass={"build_py": BuildWithFiles},
    entry_points={"console_scripts": ["megalens = megalens.commands:main"]},
    install_requires=REQUIRED,
    extras_require={
        "deepspeed": DEEPSPEED,
        "demo": DEMO,
        "sweeps": SWEEPS,
        "serve": SERVE,
        "triton": TRITON,
        "dev": DEEPSPEED + DEMO + SWEEPS + SERVE + TRITON + DEV,
    },
)
