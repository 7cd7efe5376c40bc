"""What is wrong with a disk, out of errors that libraries wrap in types and texts of their own."""

import errno
import os
from collections.abc import Iterator

from cir_jax.storage.buckets import CLIENT_PACKAGES, is_remote

_CODES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ENXIO,
    errno.ENODEV, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNRESET,
    errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN, errno.EREMOTEIO,
)  # fmt: skip
_STATUSES = tuple(
    f"{status}: "
    for status in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED",
                   "UNAUTHENTICATED")
)  # fmt: skip
"""How what tensorstore raises of a bucket begins."""
LIMIT = 200
"""Characters of a foreign error's text that a message quotes."""


def reason(error: BaseException) -> str | None:
    """The system's words ("No space left on device"), if that is what an error or its cause says;
    of a bucket the client's.

    A file that is missing or cut off is no fault of the disk: None.
    """
    for link in _chain(error):
        if type(link).__module__.partition(".")[0] in CLIENT_PACKAGES:
            return _line(link)
        if isinstance(link, OSError) and link.strerror and is_remote(str(link.filename)):
            return link.strerror[:LIMIT]
        if isinstance(link, ValueError) and str(link).startswith(_STATUSES):
            return _line(link)
        code = getattr(link, "errno", None)
        if code in _CODES:
            return os.strerror(code)
        for code in _CODES:
            if os.strerror(code) in str(link):
                return os.strerror(code)
    return None


def cause(error: BaseException) -> str:
    """One line: the system's words, else the first line of the error that began it."""
    if found := reason(error):
        return found
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _line(error)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LIMIT] if lines else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its causes and, of a group, its members."""
    while error is not None:
        yield error
        for member in getattr(error, "exceptions", ()):
            yield from _chain(member)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
