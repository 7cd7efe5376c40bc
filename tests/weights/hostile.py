"""Files for the tests of what is damaged, made to do harm, or not what it seems."""

import contextlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np

from cir_jax.weights import torch_files

MB = 2**20
LITTLE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
SIX = {"0": bytes(24)}


def piece(value):
    """The opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(count, shape, strides, offset=0, key="0", kind="FloatStorage"):
    """The opcodes of a tensor, as `torch.save` writes it."""
    about = piece("storage") + f"ctorch\n{kind}\n".encode() + piece(key) + piece("cpu")
    storage = b"(" + about + piece(count) + b"tQ"
    where = piece(offset) + piece(shape) + piece(strides) + piece(False) + b"}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + where + b"tR"


def text(value):
    """The opcodes of a string that is not to be remembered."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubled(i):
    """A dictionary of the i-th dictionary, twice: two to the power of i paths."""
    last = b"h" + bytes([i])
    return b"}q" + bytes([i + 1]) + b"(" + text("a") + last + text("b") + last + b"u"


def state(tensors):
    return b"\x80\x02}(" + b"".join(piece(name) + data for name, data in tensors.items()) + b"u."


def archive(path, tensors, storages, compress=zipfile.ZIP_STORED):
    """A zip archive in PyTorch's layout; tensors: their opcodes by name, or the whole pickle."""
    data = tensors if isinstance(tensors, bytes) else state(tensors)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"model/data/{key}", content, compress)
    return path


@contextlib.contextmanager
def memory(limit):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes"


def read_all(path, read=torch_files.read):
    tensors = read(path)
    return {name: np.asarray(tensors[name]) for name in tensors}
