"""What a file is by its first bytes, and what to say about one that is not what it should be."""

from pathlib import Path

from cir_jax.errors import WeightsError

ZIP, LEGACY, SAFETENSORS = "a PyTorch archive", "an old PyTorch file", "a safetensors file"
TEXT = "a text file"

_MAGIC = {
    b"PK\x03\x04": ZIP,
    b"version https://git-lfs": "a git-lfs pointer",
    b"\x89HDF": "an HDF5 file (of TensorFlow or Keras)",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy file",
    b"\x1f\x8b": "a gzip file",
}
_OLD = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a number, pickled in any protocol
_DOWNLOAD = "`hf download HUB_ID FILE --local-dir DIR`, or the address with /resolve/, not /blob/"
_REMEDIES = {
    "a git-lfs pointer": "The repository was cloned without git-lfs: run `git lfs install && git "
    "lfs pull` in it, or `hf download HUB_ID --local-dir DIR`",
    "an HTML page": f"The page about a file was downloaded, not the file: {_DOWNLOAD}",
    "an empty file": "The download was cut off: download it again",
}
_SUFFIXES = {SAFETENSORS: (".safetensors",), ZIP: (".pt", ".pth", ".bin", ".ckpt")}
_SUFFIXES[LEGACY] = _SUFFIXES[ZIP]


def of(path: Path) -> str:
    """A few words, "" for what is not known; weights are one of the constants here.

    Raises WeightsError where no file is.
    """
    head, size = _head(path), path.stat().st_size
    if not head:
        return "an empty file"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[:1] == b"\x80" and _OLD in head[:32]:
        return LEGACY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return TEXT
    return ""


def problem(path: Path, *expected: str) -> str:
    """The message about a file of another kind; "" for an expected one, or one unknown here."""
    kind = of(path)
    if not kind or kind in expected:
        return ""
    if kind in _SUFFIXES:
        name = path.with_suffix(_SUFFIXES[kind][0]).name
        if kind == SAFETENSORS:  # the names that directories are searched for
            name = name.replace("pytorch_model", "model")
        elif name.startswith("model."):
            name = "pytorch_model.bin"
        remedy = f"Its suffix says otherwise: rename it to {name}"
    else:
        remedy = _REMEDIES.get(kind, f"Get the file itself: {_DOWNLOAD}")
    begins = f" that begins {_head(path)[:60].decode(errors='replace')!r}" if kind == TEXT else ""
    return f"{path}: not {expected[0]}, but {kind}{begins}. {remedy}."


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise WeightsError(
            f"{path}: unreadable ({error.strerror}). Expected a file of weights."
        ) from error
