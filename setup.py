"""Installation: `pip install -e .`, with extras as needed."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "cir_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "torch": ["torch>=2.6"],  # reads .pt files; live parity tests
    "parquet": ["pyarrow>=17"],  # corpora that come as Parquet files
    "coco": ["pycocotools>=2.0.8"],  # draws the masks of data/coco_object
    # LinCIR's keywords; besides: python -m spacy download en_core_web_sm
    "keywords": ["spacy>=3.7"],
    "search": ["faiss-cpu>=1.9"],
    "demo": ["gradio>=5"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.7",
        "ruff>=0.9",
        "import-linter>=2.3",
        "pre-commit>=4",
        "pyarrow>=17",
        "pycocotools>=2.0.8",
        # carries CLIP's vocabulary, for the tokenizer fixture; few wheels
        "instant-clip-tokenizer; python_version < '3.13' and sys_platform == 'linux' "
        "and platform_machine == 'x86_64'",
    ],
}

setup(
    name="cir_jax",
    version=VERSION,
    description="Zero-shot composed image retrieval in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["cir_jax", "cir_jax.*"]),
    install_requires=(ROOT / "requirements.txt").read_text().splitlines(),
    extras_require=EXTRAS,
)
