"""Inversion stages: each image of a table becomes a stored pseudo-word (ArrayRecord, resumable).

`workdir / stage` holds `identity.json` (what the words were made of) and the shards
`words_00000.array_record`, ... A record is the word, float32[token_dim], then the concepts it was
regularised with, int32[concepts], little-endian. Shards appear whole or not at all, in
order; after a kill, the same command goes on behind the last one and writes what the unbroken run
would have written, because the randomness of an image comes from its record number alone.

Several processes invert together, over the mesh; process 0 alone writes, to the shared workdir.
"""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cir_jax import composers
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.errors import CheckpointError, ConfigError, DataError
from cir_jax.experiment import Experiment
from cir_jax.input.identity import source_identity
from cir_jax.input.tables import Table
from cir_jax.retrieval.features import stored_features
from cir_jax.sharding.constraints import rows_over
from cir_jax.sharding.mesh import batch_sharding, replicated
from cir_jax.sharding.rows import map_rows
from cir_jax.sharding.together import Together
from cir_jax.storage import faults
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import default_cache_dir
from cir_jax.storage.record_shards import RecordShards, shard_name, write_shard
from cir_jax.training.differences import differing_fields
from cir_jax.weights import finite, oti_tokens
from cir_jax.weights.fingerprint import fingerprint

IDENTITY = "identity.json"
SCRATCH = ".words"
"""Beginning of the names of shards that are being written."""

PREFIX = "words"
REMEDY = "Delete it and run the stage again: it makes this shard and those behind it anew."
SHARD_ROWS = 1024
"""Images per shard, rounded up to whole batches: what a kill can cost."""


def run(experiment: Experiment, name: str, workdir: Path) -> None:
    """Inverts what is not stored yet in `workdir / name`.

    An image that does not decode gets a word of NaN; these are counted and printed. Raises
    CheckpointError when the words there were made of something else, DataError for a table without
    images, WeightsError for features or words that are not finite though the image decodes.
    """
    table = _table(experiment, name)
    store = Store(workdir / name, _identity(experiment, name, table))
    done = store.open()
    if done < len(table):
        began = time.perf_counter()
        missing = 0
        for index, rows in _shards(_words(experiment, name, table, done), done, store.shard_rows):
            store.write(index, rows)
            missing += int(np.isnan(rows[:, 0]).sum())
        seconds = time.perf_counter() - began
        if jax.process_index() == 0:
            count = len(table) - done
            print(f"{name}: {count} images inverted in {seconds:.0f} s, {count / seconds:.1f}/s")
            if missing:
                print(f"{name}: {missing} of them unreadable: left out")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{name} is stored")


def read(experiment: Experiment, name: str, workdir: Path, table: Table) -> "Words":
    """float32[n, token_dim]: the pseudo-words of the records of `table`, in record order.

    Raises CheckpointError when stage `name` has not finished, or inverted another table.
    """
    return Words(_finished(workdir / name, table))


def _finished(directory: Path, table: Table) -> "Store":
    stored = read_identity(directory)
    store = Store(directory, stored)
    done = store.stored_rows()
    if stored["images"] != source_identity(table, "image"):
        raise CheckpointError(
            f"{directory}: holds the words of other images, {stored['images']}; this stage reads "
            f"{table!r}. Run stage {directory.name!r} again in a new --workdir."
        )
    if done < stored["rows"]:
        raise CheckpointError(
            f"{directory}: {done} of {stored['rows']} images are inverted. Finish it first: "
            f"--config.stages={directory.name},..."
        )
    return store


def export(directory: Path, output: Path, data_dir: Path) -> None:
    """Writes the words of a finished stage as SEARLE's folder (`weights.oti_tokens`).

    Images without a word are left out. Raises CheckpointError as `read`, WeightsError without
    PyTorch.
    """
    stored = read_identity(directory)
    table = Table(data_dir, stored["dataset"], stored["table"], stored["split"])
    words = _finished(directory, table).read()[0]
    names = [oti_tokens.name_of(table, i) for i in range(len(table))]
    oti_tokens.write(output, names, words, stored)
    print(f"{len(words)} words of {table!r} written to {output}")


def describe(experiment: Experiment, name: str) -> str:
    """What the stage will do, without computing (--dry_run)."""
    table, composer = _table(experiment, name), experiment.composer
    mib = len(table) * 4 * experiment.backbone.token_dim / 2**20
    settings = ", ".join(f"{k}={v}" for k, v in sorted(_settings(experiment, name).items()))
    return (
        f"{name}: {len(table)} images of {table!r} are inverted, {_batch_size(experiment, name)} "
        f"at a time on {experiment.mesh.size} device(s), and stored ({mib:.1f} MiB)\n"
        f"  {type(composer).__name__}: {settings}"
    )


def trace(experiment: Experiment, name: str) -> jax.stages.Traced:
    """The inversion of one batch of stage `name`, traced from shapes alone."""
    size, sharding = _batch_size(experiment, name), batch_sharding(experiment.mesh)
    query = {
        "reference_features": jax.ShapeDtypeStruct(
            (size, experiment.backbone.dim), np.float32, sharding=sharding
        ),
        "query_index": jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
    }
    seed = jax.ShapeDtypeStruct((), np.uint32)
    return _invert.trace(experiment.composer, experiment.mesh, experiment.frozen, query, seed)


class Store:
    """The words of one stage on disk, in shards of `shard_rows` records."""

    def __init__(self, directory: Path, identity: dict[str, Any]):
        self.directory, self.identity = directory, identity
        self.rows, self.shard_rows = identity["rows"], identity["shard_rows"]
        self.width, self.concepts = identity["token_dim"], identity["concepts"]

    def open(self) -> int:
        """Rows stored so far, on all processes. Raises CheckpointError if they are of other words.

        A new directory gets the identity file before the first word.
        """
        done, problem = 0, ""
        if jax.process_index() == 0:
            try:
                done = self._open()
            except CheckpointError as error:
                problem = str(error)
        if jax.process_count() > 1:  # all processes raise together
            state = np.asarray([done, bool(problem)])
            done, failed = map(int, multihost_utils.broadcast_one_to_all(state))
            problem = problem or ("process 0 found another run's words." if failed else "")
        if problem:
            raise CheckpointError(problem)
        return done

    def _open(self) -> int:
        if not (self.directory / IDENTITY).is_file():
            text = json.dumps(self.identity, indent=2, sort_keys=True)
            write_atomically(self.directory / IDENTITY, lambda f: f.write(text.encode()))
        stored = read_identity(self.directory)
        # of an earlier version, perhaps, with fewer settings
        stored["composer"] = composers.shaping(stored["composer"])
        if differ := differing_fields(stored, self.identity):
            keep = ""
            if stored.get("dtype") != self.identity["dtype"]:
                keep = f", or keep them: --config.evaluation.dtype={stored.get('dtype')}"
            raise CheckpointError(
                f"{self.directory}: the words there were made of something else; these differ: "
                f"{'; '.join(differ)}. Use a new --workdir, or delete that directory{keep}."
            )
        for scratch in self.directory.glob(f"{SCRATCH}*"):  # of a killed run
            scratch.unlink()
        return self.stored_rows()

    def stored_rows(self) -> int:
        """Rows of the unbroken sequence of shards from the first one on."""
        done = 0
        while done < self.rows and self._file(done // self.shard_rows).is_file():
            done = min(done + self.shard_rows, self.rows)
        return done

    def write(self, index: int, rows: np.ndarray) -> None:
        """Stores shard `index`; rows: float32[n, token_dim + concepts]. Process 0 alone writes.

        Raises CheckpointError when the disk is full or fails; the shards before are kept.
        """
        if jax.process_index() != 0:
            return
        try:
            write_shard(self._file(index), map(self._record, rows))
        except OSError as error:
            raise CheckpointError(
                f"{self._file(index)}: cannot be written ({error}). The words before it are kept: "
                "make room and run the same command again."
            ) from error

    def _record(self, row: np.ndarray) -> bytes:
        word, concepts = row[: self.width], row[self.width :].astype("<i4")
        return word.astype("<f4").tobytes() + concepts.tobytes()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All stored rows: float32[n, token_dim], int32[n, concepts].

        Raises CheckpointError naming a shard that is cut off or not of this shape.
        """
        from array_record.python.array_record_module import ArrayRecordReader

        records: list[bytes] = []
        for start in range(0, self.stored_rows(), self.shard_rows):
            file = self._file(start // self.shard_rows)
            try:
                reader = ArrayRecordReader(str(file))
                found = reader.read_all()
                reader.close()
            except Exception as error:  # the library raises many types
                raise self._damaged(file, str(error)) from error
            expected = min(self.shard_rows, self.rows - start)
            sizes = {len(record) for record in found}
            if len(found) != expected or sizes != {self.record_bytes}:
                raise self._damaged(file, f"{len(found)} records of {sorted(sizes)} bytes")
            records += found
        flat = np.frombuffer(b"".join(records), "<f4").reshape(-1, self.width + self.concepts)
        concepts = np.ascontiguousarray(flat[:, self.width :]).view("<i4")
        return flat[:, : self.width].astype(np.float32), concepts.astype(np.int32)

    @property
    def record_bytes(self) -> int:
        return 4 * (self.width + self.concepts)

    def _damaged(self, file: Path, what: str) -> CheckpointError:
        return CheckpointError(f"{file}: damaged ({what}). {REMEDY}")

    def _file(self, index: int) -> Path:
        return self.directory / shard_name(PREFIX, index)


class Words(Sequence):
    """float32[n, token_dim] of a finished `Store`; a word is read when it is asked for.

    Copies for worker processes hold the place alone.
    """

    def __init__(self, store: Store):
        self._store = store
        place = (store.directory, PREFIX, store.rows, store.shard_rows)
        self._shards = RecordShards(*place, REMEDY)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> np.ndarray:
        """One word. Raises CheckpointError naming a shard that is gone, cut off or damaged."""
        record = self._shards[index]
        if len(record) != self._store.record_bytes:
            number = int(index) // self._store.shard_rows
            raise self._shards.damaged(number, f"a record of {len(record)} bytes")
        return np.frombuffer(record[: 4 * self._store.width], "<f4").astype(np.float32)


def read_identity(directory: Path) -> dict[str, Any]:
    """Raises CheckpointError when `directory` is none of a stage that inverts images."""
    file = directory / IDENTITY
    try:
        stored = json.loads(file.read_bytes())
        if not isinstance(stored, dict):
            raise ValueError("no object")
        return stored
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing: no images are inverted there. Run the stage "
            f"(--config.stages={directory.name},...) first."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read now ({faults.cause(error)}).") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}). Delete {directory}.") from error


def _table(experiment: Experiment, name: str) -> Table:
    data = experiment.config.stage[name].data
    names = [table for table, weight in data.tables.items() if weight]
    if len(names) != 1:
        raise ConfigError(
            f"config.stage.{name}.data.tables: a stage that inverts images reads one table, not "
            f"{', '.join(names) or 'none'}."
        )
    table = Table(experiment.data_dir, data.dataset, names[0], data.get("split", "train"))
    if not len(table):
        raise DataError(f"{table!r} holds no images to invert.")
    return table


def _batch_size(experiment: Experiment, name: str) -> int:
    size = experiment.config.stage[name].batch_size
    if size < 1:
        raise ConfigError(f"config.stage.{name}.batch_size={size}; it must be 1 or more.")
    return size


def _settings(experiment: Experiment, name: str) -> dict[str, Any]:
    own = experiment.config.stage[name].composer.to_dict()
    return own or experiment.config.composer.to_dict()


def _identity(experiment: Experiment, name: str, table: Table) -> dict[str, Any]:
    composer, backbone = experiment.composer, experiment.backbone
    if not isinstance(composer, PseudoWord) or composer.trained:
        raise ConfigError(
            f"config.stage.{name}.composer: {type(composer).__name__} does not invert images "
            "without training. Use searle_oti."
        )
    size = _batch_size(experiment, name)
    phrases = getattr(composer, "phrases", None)
    transform = backbone.image_transform
    data = experiment.config.stage[name].data
    return {
        "dataset": data.dataset,
        "table": next(table for table, weight in data.tables.items() if weight),
        "split": data.get("split", "train"),
        "images": source_identity(table, "image"),
        "rows": len(table),
        "preprocessing": f"{type(transform).__module__}.{transform!r}",
        "weights": backbone.weights_id,
        "parameters": fingerprint(experiment.frozen["backbone"]),
        "dtype": backbone.dtype.name,
        "composer": composers.shaping(_settings(experiment, name)),
        "phrases": phrases.book.identity if phrases else "",
        "concepts": phrases.top_k if phrases else 0,
        "seed": experiment.config.seed,
        "token_dim": backbone.token_dim,
        "shard_rows": -(-SHARD_ROWS // size) * size,
    }


def _words(experiment: Experiment, name: str, table: Table, first: int) -> Iterator[np.ndarray]:
    """float32[rows, token_dim + concepts] of the records first..n-1, in order."""
    size = _batch_size(experiment, name)
    features = stored_features(
        experiment.backbone,
        experiment.frozen["backbone"],
        table,
        "image",
        mesh=experiment.mesh,
        batch_size=experiment.config.evaluation.batch_size,
        cache_dir=default_cache_dir(),
    )

    def load(row: int) -> dict[str, np.ndarray]:
        return {"reference_features": features[row], "query_index": np.int32(row)}

    seed = np.uint32(experiment.config.seed)
    pieces = map_rows(
        lambda query: _invert(experiment.composer, experiment.mesh, experiment.frozen, query, seed),
        load,
        len(table),
        first=first,
        mesh=experiment.mesh,
        batch_size=size,
        description=f"{name}: inverting",
    )
    return finite.checked(
        pieces,
        first,
        f"pseudo-words of stage {name}",
        experiment.backbone,
        lambda row: f"{table!r}, record {row}",
        f"its learning rate is too high, or {finite.DAMAGED}",
    )


def _shards(
    pieces: Iterator[np.ndarray], first: int, shard_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of any length -> (number, rows) of whole shards, and of the last one."""
    index, waiting = first // shard_rows, np.zeros((0, 0), np.float32)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece]) if len(waiting) else piece
        while len(waiting) >= shard_rows:
            yield index, waiting[:shard_rows]
            index, waiting = index + 1, waiting[shard_rows:]
    if len(waiting):
        yield index, waiting


@Together
@functools.partial(jax.jit, static_argnums=(0, 1))
def _invert(
    composer: PseudoWord, mesh: Mesh, frozen: Any, query: dict[str, jax.Array], seed: jax.Array
) -> jax.Array:
    with rows_over(mesh), composer.backbone.full_precision():
        rows = composer.invert({}, frozen, query, jax.random.key(seed))
    rows = finite.marked(rows, jnp.isnan(query["reference_features"]).any(axis=-1))
    if "phrases" in frozen:
        top = composer.phrases.associate(frozen["phrases"], query["reference_features"])
        rows = jnp.concatenate([rows, top.astype(jnp.float32)], axis=1)  # exact below 2**24
    return jax.lax.with_sharding_constraint(rows, replicated(mesh))
