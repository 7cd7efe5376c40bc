"""Our methods as models of mteb, and our benchmarks as its tasks: an independent judge.

    import mteb
    from cir_jax.evaluation.mteb_model import MtebModel, task

    model = MtebModel(cir_jax.load("slerp:vit_l14"))
    mteb.evaluate(model, mteb.get_task("CIRRIT2IRetrieval"))    # mteb's data, from the hub
    mteb.evaluate(model, task(benchmarks.load("circo")))        # ours, prepared here

mteb ranks and measures; images and texts are encoded as in an evaluation of ours. What differs is
the protocol: mteb's CIRR and FashionIQ are M-BEIR's copies, where the reference stays in the
gallery, FashionIQ's captions come joined and its categories pooled, so no paper of the field has
comparable numbers. The methods have prompts of their own; mteb's instructions are left out. What
mteb's recall, nDCG and MAP are in our terms says `evaluation.trec`.

Needs the extra `mteb`. Written for mteb 2.26.
"""

import hashlib
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation.evaluate import read_references, tokenise
from cir_jax.evaluation.queries import Benchmark
from cir_jax.input.identity import CROP
from cir_jax.retrieval import features, ranking
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.placement import to_host
from cir_jax.weights.files import content_id

ORGANISATION = "cir_jax"


class MtebModel:
    """An `EncoderProtocol` of mteb: image and text of a query are composed, documents are images.

    searcher: of `cir_jax.load`. name: of the model, "organization/name"; default the method's.
    Raises ConfigError where mteb is not installed, and for methods that know the references by
    their names in a dataset (searle_oti, palavra with stored words).
    """

    def __init__(self, searcher: Searcher, name: str = "") -> None:
        composer = searcher.composer
        method = type(composer).__name__.lower()
        if composer.word_rows is not None:
            raise ConfigError(
                f"{method} has words of the images of a prepared dataset; mteb's images have no "
                "names. Use a method that makes its words of pixels, such as searle."
            )
        self._searcher = searcher
        self._scoring = ranking.scoring(composer, searcher.params)
        self._meta = self._described(name or f"{ORGANISATION}/{method}")

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's ModelMeta. Its revision is a hash of the weights and of all settings: mteb reuses
        stored results of equal name and revision."""
        return self._meta

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32[n, dim], what `similarity` compares: queries (prompt_type "query") `compose`d,
        documents as `embed_gallery` has them.

        inputs: mteb's DataLoader, of whose dataset the images are read as they are stored.
        kwargs: batch_size (global) and show_progress_bar.
        Raises ConfigError for a task that is not image and text to image, DataError for images that
        cannot be read.
        """
        del hf_split, hf_subset
        columns = set(inputs.dataset.column_names) & {"image", "text"}
        query = str(getattr(prompt_type, "value", prompt_type)) == "query"
        if columns != ({"image", "text"} if query else {"image"}):
            raise ConfigError(
                f"{task_metadata.name}: {'queries' if query else 'documents'} of "
                f"{' and '.join(sorted(columns)) or 'neither image nor text'}. Methods of composed "
                "retrieval take queries of image and text, and documents that are images: tasks of "
                'category "it2i".'
            )
        own, records = self._searcher, _Images(inputs.dataset, task_metadata.name)
        options = dict(
            mesh=own.mesh, batch_size=kwargs.get("batch_size", own.batch_size), cache_dir=None
        )
        if not query:
            return features.gallery_features(
                own.composer, own.params, own.frozen, records, **options
            )
        # "text" is the query with mteb's instruction behind it
        name = "query" if "query" in inputs.dataset.column_names else "text"
        texts = [own.composer.prompt(text.strip()) for text in inputs.dataset[name]]
        rows = np.arange(len(texts))
        references = read_references(
            own.composer,
            own.frozen,
            records,
            rows,
            texts,
            [f"{own.seed}/{row}" for row in rows],
            **options,
        )
        del options["cache_dir"]
        return features.query_features(
            own.composer,
            own.params,
            own.frozen,
            tokenise(own.composer, texts),
            rows.astype(np.int32),
            **references,
            **options,
            seed=own.seed,
            description=f"{task_metadata.name} queries",
        )

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """float32[queries, documents]: the method's score, cosine similarity of most."""
        queries, gallery = (np.asarray(x, np.float32) for x in (embeddings1, embeddings2))
        if self._scoring["score"] is ranking.dot_product:
            return queries @ gallery.T
        score, params = jax.jit(self._scoring["score"]), self._scoring["params"]
        out = np.empty((len(queries), len(gallery)), np.float32)
        with self._searcher.composer.backbone.full_precision():
            for i in range(0, len(queries), ranking.QUERY_BLOCK):
                rows = slice(i, i + ranking.QUERY_BLOCK)
                for j in range(0, len(gallery), ranking.GALLERY_BLOCK):
                    some = slice(j, j + ranking.GALLERY_BLOCK)
                    out[rows, some] = score(params, queries[rows], gallery[some])
        return out

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """float32[n]: of each query and its own document."""
        pairs = zip(np.asarray(embeddings1), np.asarray(embeddings2), strict=True)
        return np.asarray([self.similarity(a[None], b[None])[0, 0] for a, b in pairs])

    def _described(self, name: str) -> Any:
        own = self._searcher
        composer, backbone = own.composer, own.composer.backbone
        settings = {
            "weights": backbone.weights_id,
            "params": content_id("", jax.tree.map(to_host, own.params)),
            "method": repr(dict(composer.settings) or sorted(_plain(vars(composer)).items())),
            "beside": dict(composer.contents()),
            "preprocessing": repr(backbone.image_transform),
            "dtype": backbone.dtype.name,
            "seed": own.seed,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        cosine = self._scoring["score"] is ranking.dot_product
        return _mteb("mteb.models.model_meta").ModelMeta(
            loader=None,
            name=name,
            revision=digest[:16],
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=sum(x.size for x in jax.tree.leaves((own.params, own.frozen))),
            memory_usage_mb=None,
            max_tokens=backbone.context_length,
            embed_dim=backbone.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name="cosine" if cosine else None,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "image"],
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | str | tuple)}


class _Images(Sequence):
    """The image column of a dataset as records {"image": bytes}, in the files' own encoding."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._name = name
        self._rows = dataset.cast_column("image", _mteb("datasets").Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> dict[str, bytes]:
        image = self._rows[int(index)]["image"]
        if image is None:
            raise DataError(f"{self.name(index)}: has no image. Load the dataset again.")
        if image["bytes"] is not None:
            return {"image": image["bytes"]}
        try:
            with open(image["path"], "rb") as file:
                return {"image": file.read()}
        except OSError as error:
            raise DataError(f"{image['path']}: cannot be read ({error.strerror}).") from error

    def name(self, index: int) -> str:
        return f"{self._name}, image {index}"


def task(benchmark: Benchmark) -> Any:
    """A benchmark as a retrieval task of mteb, which needs no network. All ground truths count; the
    images' files are held in memory.

    Documents are numbered so that mteb's order of equal scores, last id first, is ours. Where the
    protocol ranks other images for each query (CIRR without the reference, GeneCIS' candidates),
    these are its `top_ranked`.
    Raises ConfigError for protocols that mteb has no words for: several texts of a query, prompts
    of their own, galleries by category; and where there is no public ground truth.
    """
    protocol = benchmark.protocol
    unfit = protocol.captions != "single" or protocol.text != "modification" or protocol.by_group
    if unfit or benchmark.references is not None or not benchmark.labelled:
        raise ConfigError(
            f"{benchmark.name} {benchmark.split} under protocol {protocol.id}"
            f"{'' if benchmark.labelled else ', without public ground truth,'} is no task for mteb:"
            " it wants one text per query, the reference in the gallery, and no prompt of its own. "
            "Evaluate it with launch/eval.py."
        )
    datasets, size = _mteb("datasets"), len(benchmark.gallery)
    last = size - 1
    ids = [f"{last - position:09d}" for position in range(size)]
    images = [
        {"bytes": _encoded(benchmark.gallery[i], f"{benchmark.name}, gallery record {i}")}
        for i in range(size)
    ]
    features_ = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    corpus = datasets.Dataset.from_dict({"id": ids, "image": images}, features=features_)
    features_["text"] = datasets.Value("string")
    queries = datasets.Dataset.from_dict(
        {
            "id": [str(query.id) for query in benchmark.queries],
            "image": [images[query.reference] for query in benchmark.queries],
            "text": [query.texts[0] for query in benchmark.queries],
        },
        features=features_,
    )
    top_ranked = None
    if protocol.gallery == "candidates" or protocol.remove_reference:
        candidates = protocol.gallery == "candidates"
        top_ranked = {
            str(query.id): [
                ids[position]
                for position in (query.candidates if candidates else range(size))
                if not (protocol.remove_reference and position == query.reference)
            ]
            for query in benchmark.queries
        }
    split = {
        "corpus": corpus,
        "queries": queries,
        "relevant_docs": {
            str(query.id): {ids[target]: 1 for target in query.targets}
            for query in benchmark.queries
        },
        "top_ranked": top_ranked,
    }
    return _task(benchmark, split)


def _encoded(record: Mapping[str, Any], what: str) -> bytes:
    """The file of a record's image; where a part of it counts, a PNG of that."""
    if not any(record.get(CROP, ())):
        return bytes(record["image"])
    buffer = io.BytesIO()
    features.open_image(record, "image", what).save(buffer, "PNG")
    return buffer.getvalue()


def _task(benchmark: Benchmark, split: Mapping[str, Any]) -> Any:
    made = _mteb("mteb.abstasks.retrieval").AbsTaskRetrieval
    described = _mteb("mteb.abstasks.task_metadata").TaskMetadata(
        name=f"{benchmark.name} {benchmark.split}",
        description=f"{benchmark.name}, split {benchmark.split}, under {benchmark.protocol.id}.",
        reference=None,
        dataset={"path": benchmark.name, "revision": benchmark.data or "unknown"},
        type="Any2AnyRetrieval",
        category="it2i",
        modalities=["text", "image"],
        eval_splits=[benchmark.split],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )

    class Prepared(made):
        metadata = described

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {"default": {benchmark.split: dict(split)}}
            self.data_loaded = True

    return Prepared()


def _mteb(name: str) -> Any:
    """A module of mteb or what it stands on. Raises ConfigError naming the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"mteb's code judges with mteb ({error}): pip install 'cir_jax[mteb]'."
        ) from error
