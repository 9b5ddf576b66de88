"""Packaging of GRPO Core: one distribution, three import packages in the folders the project is organised by."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(
    r'^__version__ = "(.+?)"', Path("kernels/grpo_kernels/__init__.py").read_text("utf-8"), re.MULTILINE
)[1]
FOLDERS = {"grpo_core": ".", "grpo_kernels": "kernels", "affectgpt": "model"}

setup(
    name="grpo-core",
    version=VERSION,
    description="A low-level GRPO engine with fused Triton kernels, and AffectGPT-R1, the recipe it is made for",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["GRPO", "reinforcement learning", "RLHF", "multimodal", "LLM", "Triton", "emotion recognition"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={name: name if folder == "." else f"{folder}/{name}" for name, folder in FOLDERS.items()},
    entry_points={"console_scripts": ["affectgpt = affectgpt.cli:main"]},
    packages=[
        package for name, folder in FOLDERS.items() for package in find_packages(folder, include=[name, f"{name}.*"])
    ],
    package_data={
        **{name: ["py.typed"] for name in FOLDERS},
        "affectgpt.configs": ["*.yaml"],
        "affectgpt.emotion_wheel": ["data/*"],
        "affectgpt.report": ["templates/*"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "peft>=0.19",
        "safetensors>=0.6",
        "numpy>=2.0",
        "tqdm",
        "pyyaml",
    ],
    extras_require={
        # real media, emotion tables and the run report: what recipes/affectgpt_*.py need
        "affectgpt": ["av>=17", "nltk>=3.9", "openpyxl>=3.1", "pillow>=11", "matplotlib>=3.9", "jinja2>=3.1"],
        # processors of judges that have a part for videos (Qwen-VL, Gemma 4, InternVL)
        "judge": ["torchvision"],
        # the peers that losses and kernels are compared with
        "bench": ["trl==1.16.0", "liger-kernel==0.8.5"],
        # the documentation's pages; the Makefile installs these alone: pages are made without importing us
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "ruff>=0.12"],
        "dev": [
            "hypothesis>=6",
            "mypy>=2.4",
            "pandas>=2.2",
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.12",
            "scipy>=1.13",
            "setuptools>=77",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
