"""Pickles read as data: nothing is imported or called, and memory is bounded by the file's size.

Python's own reader allocates what a pickle declares before it looks whether that is there (nine
bytes can take gigabytes), and overflows the stack on keys nested deeply enough. Here lengths are
compared with what is there, memo entries come one after the other as all writers number them, keys
are plain values, and containers are counted. The opcodes' arguments are decoded by `pickletools`.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

LIMIT = 1_000_000
"""Of containers and objects: the weights of a model with 1000 tensors make about 10,000."""

_ARGUMENTS = {ord(op.code): op.arg.reader for op in pickletools.opcodes if op.arg}
_NAMES = {ord(op.code): op.name.lower() for op in pickletools.opcodes}
_KEYS = (str, int, float, bool, bytes, type(None))


class Global(NamedTuple):
    """What a pickle calls by its name: a class or a function, not imported."""

    module: str
    name: str


class Object:
    """Stands for an object of any class: runs nothing, keeps its state and items."""

    __slots__ = ("made_by", "state")

    def __init__(self, made_by: Any):
        self.made_by, self.state = made_by, {}


_ODD = Object("a key that is no plain value")


class Reader:
    """Reads one pickle after the other out of `file` (an io.BytesIO).

    As it is, it takes only plain values: numbers, strings, lists, tuples, dictionaries. Subclasses
    say what becomes of the rest.
    """

    def __init__(self, file: io.BytesIO):
        # a file on disk would allocate as many bytes as it is asked for
        self._file, self._count = file, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._handlers: list[Callable[[Any], None] | None] = [
            getattr(self, f"_{_NAMES[code]}", None) if code in _NAMES else None
            for code in range(256)
        ]

    def load(self) -> Any:
        """The next pickle. Raises UnpicklingError, or what decoding a damaged argument raises."""
        self._stack, self._marks, self._memo = [], [], []
        read, handlers, readers = self._file.read, self._handlers, _ARGUMENTS
        while code := read(1):
            code = code[0]
            if code == _STOP:
                return self._stack.pop()
            handler = handlers[code]
            if handler is None:
                raise pickle.UnpicklingError(f"opcode {_NAMES.get(code, code)!r} has no place here")
            reader = readers.get(code)
            handler(reader(self._file) if reader else None)
        raise pickle.UnpicklingError("it ends too early")

    # --- what a subclass may answer

    def named(self, module: str, name: str) -> Any:
        """A class or function that the pickle names."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, expected only lists of strings")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What a call would have returned."""
        raise pickle.UnpicklingError("it calls a function, expected only lists of strings")

    def outside(self, pid: Any) -> Any:
        """What the persistent id `pid` refers to."""
        raise pickle.UnpicklingError("it refers to something outside the file")

    # --- opcodes

    def _charge(self, count: int) -> None:
        self._count += count
        if self._count > LIMIT:
            raise pickle.UnpicklingError(f"more than {LIMIT} containers and objects")

    def _made(self, value: Any) -> None:
        self._charge(1)
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _plain(self, value: Any) -> None:
        self._stack.append(value)

    _int = _binint = _binint1 = _binint2 = _long = _long1 = _long4 = _float = _binfloat = _plain
    _string = _binstring = _short_binstring = _unicode = _short_binunicode = _plain
    _binunicode = _binunicode8 = _binbytes = _short_binbytes = _binbytes8 = _bytearray8 = _plain

    def _none(self, _: None) -> None:
        self._stack.append(None)

    def _newtrue(self, _: None) -> None:
        self._stack.append(True)

    def _newfalse(self, _: None) -> None:
        self._stack.append(False)

    def _proto(self, version: int) -> None:
        if version > pickle.HIGHEST_PROTOCOL:
            raise pickle.UnpicklingError(f"unknown protocol {version}")

    def _frame(self, _: int) -> None:
        """Only for readers that read ahead."""

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _pop(self, _: None) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._marked()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _memoize(self, _: None) -> None:
        self._memo.append(self._stack[-1])

    def _put(self, at: int) -> None:
        if at == len(self._memo):
            self._memo.append(self._stack[-1])
        elif 0 <= at < len(self._memo):
            self._memo[at] = self._stack[-1]
        else:
            raise pickle.UnpicklingError(f"memo entry {at} after {len(self._memo)}")

    def _get(self, at: int) -> None:
        if at < 0:
            raise pickle.UnpicklingError(f"memo entry {at}")
        self._stack.append(self._memo[at])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    def _empty_list(self, _: None) -> None:
        self._made([])

    def _empty_dict(self, _: None) -> None:
        self._made({})

    def _empty_set(self, _: None) -> None:
        self._made(Object(Global("builtins", "set")))

    def _empty_tuple(self, _: None) -> None:
        self._made(())

    def _tuple1(self, _: None) -> None:
        self._made((self._stack.pop(),))

    def _tuple2(self, _: None) -> None:
        second, first = self._stack.pop(), self._stack.pop()
        self._made((first, second))

    def _tuple3(self, _: None) -> None:
        third, second, first = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._made((first, second, third))

    def _tuple(self, _: None) -> None:
        self._made(tuple(self._marked()))

    def _list(self, _: None) -> None:
        self._made(self._marked())

    def _frozenset(self, _: None) -> None:
        self._marked()
        self._made(Object(Global("builtins", "frozenset")))

    def _dict(self, _: None) -> None:
        items = self._marked()
        self._made({})
        self._set(items)

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._marked())

    def _additems(self, _: None) -> None:
        self._marked()

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        target = target.state if isinstance(target, Object) else target
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"items are set of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # the hash of a tuple in a tuple in a tuple ... overflows the stack
            target[key if type(key) in _KEYS else _ODD] = value

    def _global(self, names: str) -> None:
        self._made(self.named(*names.split(" ", 1)))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise pickle.UnpicklingError("it names something that is no text")
        self._made(self.named(module, name))

    def _reduce(self, _: None) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._call(function, args)

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        self._stack.pop()
        self._reduce(None)

    def _inst(self, names: str) -> None:
        args = self._marked()
        self._call(self.named(*names.split(" ", 1)), tuple(args))

    def _obj(self, _: None) -> None:
        function, *args = self._marked()
        self._call(function, tuple(args))

    def _call(self, function: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError(f"a call with {type(args).__name__} for arguments")
        self._made(self.call(function, args))

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Object) and isinstance(state, dict):
            self._charge(len(state) if target.state else 0)  # a copy
            target.state = target.state | state if target.state else state

    def _persid(self, pid: str) -> None:
        self._made(self.outside(pid))

    def _binpersid(self, _: None) -> None:
        self._made(self.outside(self._stack.pop()))


_STOP = ord(pickle.STOP)


def load(data: bytes) -> Any:
    """The plain values of one pickle. Raises as `Reader.load`."""
    return Reader(io.BytesIO(data)).load()
