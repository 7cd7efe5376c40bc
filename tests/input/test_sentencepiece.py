"""`spiece.model` without sentencepiece: a file by hand, and the library itself."""

import io
import struct
from pathlib import Path

import pytest

from cir_jax.errors import WeightsError
from cir_jax.input import sentencepiece
from cir_jax.input.text import Tokenizer

SPECIAL = {"bos": None, "eos": "</s>", "pad": "<pad>", "context_length": 16}


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer; all lengths here fit in one byte or two."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128, n // 128])

    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def model(pieces: dict[str, tuple[float, int]], model_type: int = 1) -> bytes:
    """A SentencePiece model: piece -> (score, type)."""
    data = b""
    for piece, (score, kind) in pieces.items():
        body = field(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        data += field(1, body + (b"" if kind == 1 else field(3, kind)))
    return data + field(2, field(1, b"x" * 200) + field(3, model_type))


PIECES = {"<pad>": (0.0, 3), "</s>": (0.0, 3), "<unk>": (0.0, 2), "▁": (-2.0, 1), "▁a": (-1.0, 1)}
PIECES |= {"▁red": (-1.5, 1), "▁re": (-1.0, 1), "d": (-3.0, 1), "▁$": (-4.0, 1)}


def test_a_file_by_hand(tmp_path):
    (tmp_path / "spiece.model").write_bytes(model(PIECES))
    tokenizer = Tokenizer.by_tokens(tmp_path, **SPECIAL)
    # the better sum of scores: one piece for "red"; what is in no piece is unknown
    assert tokenizer(["  a  red $ ", "a x"], 8).tolist() == [
        [4, 5, 8, 1, 0, 0, 0, 0],
        [4, 3, 2, 1, 0, 0, 0, 0],
    ]
    assert tokenizer.vocab_size == 9 + 100 and tokenizer.id_of("$") == 8
    assert tokenizer._tokenizer.token_to_id("<extra_id_0>") == 108  # T5 counts them down


def test_files_that_are_none(tmp_path):
    path = tmp_path / "spiece.model"
    for data, message in (
        (b"<html>", "spiece.model: not a SentencePiece model .* copy it again"),
        (b"", "spiece.model: not a SentencePiece model"),
        (model(PIECES)[:40], "spiece.model: not a SentencePiece model"),
        (model(PIECES, model_type=2), "expected a unigram model, as T5's. Give its tokenizer.json"),
    ):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            Tokenizer.by_tokens(tmp_path, **SPECIAL)


@pytest.mark.peer
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_equal_to_sentencepiece(tmp_path, byte_fallback):
    """Ids of a model trained as T5's was, with its normalisation of characters; unknown ones as
    bytes in multilingual models."""
    spm = pytest.importorskip("sentencepiece")
    texts = Path(__file__).read_text().splitlines() + sentencepiece.__doc__.splitlines()
    # "</s>" in a text is the token here, as in transformers
    texts = [line for line in texts if line.strip() and "<" not in line] * 4
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=150 + 256 * byte_fallback,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        byte_fallback=byte_fallback,
    )
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    theirs = spm.SentencePieceProcessor(model_proto=written.getvalue())
    ours = sentencepiece.read(tmp_path / "spiece.model")
    odd = ["A  photo of $ that   is red ", "tab\there\n", "½ ﬁ Ｆｕｌｌ ™ é é", "漢 ☃", "", "a▁b"]
    for text in texts[:100] + odd:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
