"""Pickles as data: Python's own values, no code, and memory only for what is really there."""

import io
import pickle
import random
import struct
import tracemalloc

import pytest

from cir_jax.errors import DataError
from cir_jax.input import phrases, pickles

END = struct.pack("<Q", 2**33)  # 8 GB, which nobody has sent
HOSTILE = {
    b"\x8d" + END: "expected 8589934592 bytes",  # BINUNICODE8
    b"\x8e" + END: "expected 8589934592 bytes",  # BINBYTES8
    b"\x96" + END: "expected 8589934592 bytes",  # BYTEARRAY8
    b"\x8b" + struct.pack("<i", 2**31 - 1): "not enough data",  # LONG4
    b"T" + struct.pack("<i", 2**31 - 1): "expected 2147483647 bytes",  # BINSTRING
    b"\x95" + END: "ends too early",  # FRAME
    b"Nr" + struct.pack("<I", 2**31): "memo entry 2147483648 after 0",  # LONG_BINPUT
    b"Np2147483648\n": "memo entry 2147483648 after 0",  # PUT
    b"Ng-1\n": "memo entry -1",  # GET
    b"}" * 10_001: "more than 10000 containers",
    b"(" * 100_000: "ends too early",
    b"\x82\x01": "opcode 'ext1' has no place here",
    b"\x97": "opcode 'next_buffer' has no place here",
    b"\xff": "opcode 255 has no place here",
    b"\x80\x63.": "unknown protocol 99",
    b"cos\nsystem\n.": "it names os.system, expected only lists of strings",
    b"\x8c\x02os\x8c\x06system\x93.": "it names os.system",
    b"(Nios\nsystem\n.": "it names os.system",
    b"N)R.": "it calls a function",
    b"NQ.": "it refers to something outside the file",
    b"Pkey\n.": "it refers to something outside the file",
    b"]NNs.": "items are set of a list|pop from an empty",
    b"": "ends too early",
    b".": "pop from empty list",
}


def random_value(rng: random.Random, depth: int) -> object:
    """Of every type and size that a pickle has an opcode of its own for."""
    plain = [None, True, False, 1, -5, 300, 2**40, -(2**70), 2**3000, 3.5, float("inf"), "", "x",
             "é" * 300, "日本\n'", b"abc", b"x" * 300]  # fmt: skip
    kind = rng.randrange(5) if depth else 0
    items = [random_value(rng, depth - 1) for _ in range(rng.randrange(5))] if kind > 1 else []
    if kind == 2:
        return items
    if kind == 3:
        return tuple(items)
    if kind == 4:
        keys = rng.sample(["a", 1, None, 2.5, b"k", True, "z" * 300], len(items))
        return dict(zip(keys, items, strict=True))
    return rng.choice(plain)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_values_are_those_of_the_library(protocol):
    rng = random.Random(protocol)
    values = [random_value(rng, 5) for _ in range(200)]
    values.append([values[0], values[0], values])  # shared ones come from the memo
    for value in values[:-1]:
        data = pickle.dumps(value, protocol)
        if b"_codecs" in data:  # bytes before protocol 3 are a call
            with pytest.raises(pickle.UnpicklingError, match="it names _codecs.encode"):
                pickles.load(data)
        else:
            assert repr(pickles.load(data)) == repr(pickle.loads(data)) == repr(value)


def test_what_refers_to_itself_comes_back():
    value = {"list": []}
    value["list"].append(value)
    got = pickles.load(pickle.dumps(value))
    assert got["list"][0] is got


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: data[:6].hex())
def test_what_a_pickle_declares_takes_no_memory(monkeypatch, data):
    assert pickles.LIMIT <= 10**6  # of some 100 bytes each
    monkeypatch.setattr(pickles, "LIMIT", 10_000)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, IndexError, pickle.UnpicklingError), match=HOSTILE[data]):
            pickles.load(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 200 * len(data)


def test_deep_values_do_not_overflow_the_stack():
    """As the key of a dictionary the hash of such a tuple would end the process."""
    deep = b"N" + b"\x85" * 100_000
    got = pickles.load(b"}" + deep + b"Ns.")
    assert [type(key) for key in got] == [pickles.Object]
    assert type(pickles.load(deep + b".")) is tuple
    with pytest.raises(pickle.UnpicklingError, match="it names something that is no text"):
        pickles.load(deep + b"N\x93.")


def test_one_after_the_other():
    file = io.BytesIO(pickle.dumps([1]) + pickle.dumps({"a": 2}) + b"rest")
    reader = pickles.Reader(file)
    assert (reader.load(), reader.load(), file.read()) == ([1], {"a": 2}, b"rest")


def test_a_phrase_book_of_nine_bytes(tmp_path):
    file = tmp_path / "concept_to_phrases.pkl"
    file.write_bytes(b"\x8d" + END)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="concept_to_phrases.pkl: not a phrase book .*expected"):
            phrases.read(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
