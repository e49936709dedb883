"""An interpreter for pickles that creates plain values, tensors and inert records, and calls no code that they name.

Python's unpickler imports and calls what a pickle names. Even torch's ``weights_only`` unpickler calls functions that
allocate or compute as much as the file asks for (``bytearray``, tensor constructors, codecs), and hashes containers
that contain each other. This interpreter knows the opcodes that ``torch.save`` writes and treats every name as data:
a handful have an equivalent here, all others become records or are refused.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Hashable
from typing import Any

from maestro_scale.errors import shorten
from maestro_scale.untrusted import InputError

MAX_OPCODES = 4_000_000  # a tensor takes about 60
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_TUPLE_KEYS = 1000
KEY_BITS = 60
_SCALARS = (str, int, float, bool, bytes, type(None))


class Name:
    """A class or function that a pickle names; it is not imported."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return self.path


class InertRecord:
    """An object whose class is not loaded: ``path`` of the class, constructor ``args``, and ``fields`` of its state."""

    def __init__(self, path: str, args: tuple[Any, ...]) -> None:
        self.path, self.args = path, args
        self.fields: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<{self.path} with {len(self.args)} arguments and {len(self.fields)} fields>"


Call = Callable[[str, tuple[Any, ...]], Any]


class Interpreter:
    """Reads one pickle of protocol 2.

    ``call(path, args)``: the value of a call that the pickle describes. ``storage(id)``: the value of a persistent id.
    """

    def __init__(self, data: bytes, call: Call, storage: Callable[[Any], Any]) -> None:
        self._file = io.BytesIO(data)
        self._call, self._storage = call, storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._num_tuple_keys = 0

    def load(self) -> Any:
        """The value. InputError if the pickle is damaged or has an opcode that a checkpoint does not need."""
        try:
            for _ in range(MAX_OPCODES):
                code = self._read(1)
                if code == pickle.STOP:
                    return self._pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise InputError(f"unsupported opcode {code!r}")
                operation(self)
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(str(error)) from None
        raise InputError(f"more than {MAX_OPCODES} opcodes")

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise InputError("the pickle is cut short")
        return data

    def _protocol(self) -> None:
        self._read(1)  # opcodes of later protocols are refused one by one

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        line = self._file.readline(1000)
        if not line.endswith(b"\n"):
            raise InputError("the pickle is cut short")
        return line[:-1].decode()

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise InputError("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _top(self, kinds: type | tuple[type, ...]) -> Any:
        value = self._pop()
        self._stack.append(value)
        if not isinstance(value, kinds):
            raise InputError(f"the pickle fills {shorten(type(value).__name__)} as another type")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise InputError("the pickle ends a group that it did not begin")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    def _text(self, length: int) -> str:
        if length > MAX_TEXT_BYTES:
            raise InputError(f"a text of {length} bytes")
        return self._read(length).decode()

    def _global(self) -> None:
        self._push(Name(f"{self._line()}.{self._line()}"))

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(args, tuple) or not isinstance(function, Name):
            raise InputError("the pickle calls something that is not a name")
        self._push(self._call(function.path, args))

    def _new_object(self) -> None:
        args, kind = self._pop(), self._pop()
        if not isinstance(args, tuple) or not isinstance(kind, Name):
            raise InputError("the pickle creates an object of something that is not a name")
        self._push(self._call(kind.path, args))

    def _build(self) -> None:
        state = self._pop()
        target = self._top(object)
        if isinstance(target, InertRecord):
            target.fields.update(state if isinstance(state, dict) else {"state": state})
        # State of other values, such as the _metadata of a state dict, is not needed.

    def _append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _extend(self) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._fill(self._top(dict), [key, value])

    def _set_items(self) -> None:
        items = self._pop_mark()
        self._fill(self._top(dict), items)

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise InputError("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._as_key(key)] = value

    def _as_key(self, key: Any) -> Hashable:
        # Hashing a tuple of tuples that contain each other twice takes exponential time.
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, _SCALARS) for part in parts):
            raise InputError("the pickle has a key that is not a text or a number")
        # Numbers with equal hashes are easy to find, and n of them fill a dict in n^2 time: integers that differ by a
        # multiple of 2^61 - 1, and tuples. Hashes of texts are random.
        if any(isinstance(part, int) and part.bit_length() > KEY_BITS for part in parts):
            raise InputError(f"the pickle has a key of more than {KEY_BITS} bits")
        self._num_tuple_keys += isinstance(key, tuple)
        if self._num_tuple_keys > MAX_TUPLE_KEYS:
            raise InputError(f"the pickle has more than {MAX_TUPLE_KEYS} keys that are tuples")
        return key

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise InputError("the pickle refers to a value that it does not have")
        self._push(self._memo[index])

    def _long(self) -> None:
        length = self._number("<B")
        if length > 32:
            raise InputError(f"an integer of {length} bytes")
        self._push(int.from_bytes(self._read(length), "little", signed=True))


_OPERATIONS: dict[bytes, Callable[[Interpreter], None]] = {
    pickle.PROTO: Interpreter._protocol,
    pickle.MARK: Interpreter._mark,
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.BININT: lambda m: m._push(m._number("<i")),
    pickle.BININT1: lambda m: m._push(m._number("<B")),
    pickle.BININT2: lambda m: m._push(m._number("<H")),
    pickle.LONG1: Interpreter._long,
    pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
    pickle.BINUNICODE: lambda m: m._push(m._text(m._number("<I"))),
    pickle.SHORT_BINSTRING: lambda m: m._push(m._read(m._number("<B"))),
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.EMPTY_LIST: lambda m: m._push([]),
    pickle.EMPTY_DICT: lambda m: m._push({}),
    pickle.TUPLE: lambda m: m._push(tuple(m._pop_mark())),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.APPEND: Interpreter._append,
    pickle.APPENDS: Interpreter._extend,
    pickle.SETITEM: Interpreter._set_item,
    pickle.SETITEMS: Interpreter._set_items,
    pickle.GLOBAL: Interpreter._global,
    pickle.REDUCE: Interpreter._reduce,
    pickle.NEWOBJ: Interpreter._new_object,
    pickle.BUILD: Interpreter._build,
    pickle.BINPERSID: lambda m: m._push(m._storage(m._pop())),
    pickle.BINPUT: lambda m: m._put(m._number("<B")),
    pickle.LONG_BINPUT: lambda m: m._put(m._number("<I")),
    pickle.BINGET: lambda m: m._get(m._number("<B")),
    pickle.LONG_BINGET: lambda m: m._get(m._number("<I")),
}
