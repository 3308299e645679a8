"""The pickle inside a torch checkpoint, read as data: nothing is imported, called or unpickled.

`torch_format` takes `data.pkl` apart here. Python's own `pickletools` splits it into operations; the interpreter below
knows the operations that build plain values, and of callables only the names in `_CALLS`, each standing for a function
of this module. Any other name is an error before anything is made of it.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ekiden.checkpoint.lazy import DTYPES, LazyTensor, TorchValue

MAX_OPERATIONS = 1_000_000
DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?")


class NotData(Exception):
    """The pickle holds something that is not data; the message says what."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, as 'module name'; only a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the checkpoint: key, element type (None: bytes), number of elements."""

    key: str
    dtype: str | None
    elements: int

    @property
    def bytes(self) -> int:
        """Size that the pickle claims."""
        return self.elements * (DTYPES[self.dtype].item_bytes if self.dtype else 1)


@dataclass
class _NumpyDType:
    code: str
    order: str = "<"


MakeTensor = Callable[[Storage, int, tuple[int, ...], tuple[int, ...], str], LazyTensor]
_STORAGES = {dtype.storage: name for name, dtype in DTYPES.items() if dtype.storage}
_MARK = object()


def load_pickle(data: bytes, make_tensor: MakeTensor) -> Any:
    """Return the value that the pickle `data` describes.

    Args:
        make_tensor: makes a tensor of (storage, offset, shape, stride, dtype name); the three are in elements.

    Raises:
        NotData: it refers to anything that is not on the list, or is not well-formed.
    """
    try:
        return _Interpreter(make_tensor).run(data)
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        raise NotData(f"it is not well-formed ({str(error)[:80]})") from None
    except RecursionError:
        raise NotData("it is nested too deep") from None


class _Interpreter:
    """A stack machine for the operations that plain data needs."""

    def __init__(self, make_tensor: MakeTensor) -> None:
        self.make_tensor = make_tensor
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return the value that `data` builds.

        Raises:
            NotData: an operation, name or call that is not on the lists, no end, or too many operations.
        """
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(data)
        for count, (operation, argument, _position) in enumerate(operations):
            if count > MAX_OPERATIONS:
                raise NotData(f"it has more than {MAX_OPERATIONS} operations")
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name not in ("PROTO", "FRAME"):
                handler = getattr(self, f"do_{name.lower()}", None)
                if handler is None:
                    raise NotData(f"it uses the pickle operation {name}")
                handler(argument)
        raise NotData("it has no end")

    def _to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise NotData("it is not well-formed (no mark)")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def do_mark(self, _: None) -> None:
        """Remember where the items of a list, tuple or dict begin."""
        self.stack.append(_MARK)

    def do_memoize(self, _: None) -> None:
        """Number the newest value, so that it can be referred to."""
        self.memo[len(self.memo)] = self.stack[-1]

    def do_tuple(self, _: None) -> None:
        """Make a tuple of the items since the mark."""
        self.stack.append(tuple(self._to_mark()))

    def do_tuple1(self, _: None) -> None:
        """Make a tuple of one item."""
        self._tuple(1)

    def do_tuple2(self, _: None) -> None:
        """Make a tuple of two items."""
        self._tuple(2)

    def do_tuple3(self, _: None) -> None:
        """Make a tuple of three items."""
        self._tuple(3)

    def _tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.stack.append(items)

    def do_list(self, _: None) -> None:
        """Make a list of the items since the mark."""
        self.stack.append(self._to_mark())

    def do_dict(self, _: None) -> None:
        """Make a dict of the keys and values since the mark."""
        items = self._to_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def do_append(self, _: None) -> None:
        """Append one item to a list."""
        item = self.stack.pop()
        list.append(self.stack[-1], item)

    def do_appends(self, _: None) -> None:
        """Append the items since the mark to a list."""
        items = self._to_mark()
        list.extend(self.stack[-1], items)

    def do_additems(self, _: None) -> None:
        """Add the items since the mark to a set."""
        items = self._to_mark()
        set.update(self.stack[-1], items)

    def do_setitem(self, _: None) -> None:
        """Set one item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], key, value)

    def do_setitems(self, _: None) -> None:
        """Set the items since the mark in a dict."""
        items = self._to_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(self.stack[-1], key, value)

    def do_global(self, name: str) -> None:
        """Refer to 'module name', which has to be on the lists."""
        self.stack.append(_global(name))

    def do_stack_global(self, _: None) -> None:
        """The same, module and name taken from the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_global(f"{module} {name}"))

    def do_binpersid(self, _: None) -> None:
        """Refer to a storage: ('storage', type, key, location, elements); the location is left behind."""
        kind, storage, key, _location, elements = self.stack.pop()[:5]
        if kind != "storage" or not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise NotData("it refers to something that is no storage")
        if storage.name in ("torch.storage UntypedStorage", "torch UntypedStorage"):
            self.stack.append(Storage(key, None, elements))
        else:
            self.stack.append(Storage(key, _STORAGES[storage.name.removeprefix("torch ")], elements))

    def do_reduce(self, _: None) -> None:
        """Call one of `_CALLS`."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.name not in _CALLS or type(arguments) is not tuple:
            raise NotData(f"it calls {getattr(function, 'name', 'something').replace(' ', '.')[:80]}")
        self.stack.append(_CALLS[function.name](self, *arguments))

    def do_build(self, _: None) -> None:
        """Fill in the few objects that torch fills in: a NumPy type's byte order, a state dict's metadata."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _NumpyDType):
            target.order = state[1]
        elif isinstance(target, OrderedDict) and type(state) is dict:
            # nn.Module.state_dict keeps its modules' versions so; nothing else is taken.
            if "_metadata" in state:
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise NotData("it fills in an object that is not data")

    def tensor_v2(
        self, storage: Storage, offset: Any, shape: Any, stride: Any, grad: Any, _hooks: Any, *_: Any
    ) -> LazyTensor:
        """Stand for `torch._utils._rebuild_tensor_v2`: the type is the storage's."""
        if storage.dtype is None:
            raise NotData("it has a tensor without an element type")
        return self._tensor(storage, offset, shape, stride, storage.dtype, grad)

    def tensor_v3(
        self,
        storage: Storage,
        offset: Any,
        shape: Any,
        stride: Any,
        grad: Any,
        _hooks: Any,
        dtype: Any,
        *_: Any,
    ) -> LazyTensor:
        """Stand for `torch._utils._rebuild_tensor_v3`: the type is given, the storage is bytes."""
        return self._tensor(storage, offset, shape, stride, dtype.value, grad)

    def _tensor(
        self, storage: Storage, offset: Any, shape: Any, stride: Any, dtype: str, grad: Any
    ) -> LazyTensor:
        shape, stride = (tuple(v.value if isinstance(v, TorchValue) else v) for v in (shape, stride))
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *stride)):
            raise NotData("it has a tensor with a shape, stride or offset that cannot be")
        if len(shape) != len(stride) or not isinstance(storage, Storage) or type(grad) is not bool:
            raise NotData("it has a tensor that is not well-formed")
        tensor = self.make_tensor(storage, offset, shape, stride, dtype)
        return _flagged(tensor, grad, False)

    def parameter(self, data: LazyTensor, grad: Any, *_: Any) -> LazyTensor:
        """Stand for `torch._utils._rebuild_parameter`."""
        return _flagged(data, bool(grad), True)

    def from_type(self, function: Global, kind: Global, arguments: tuple[Any, ...], _state: Any) -> Any:
        """Stand for `torch._tensor._rebuild_from_type_v2`; a subclass's own state is left behind.

        Raises:
            NotData: a class that is not torch's.
        """
        if kind.name not in ("torch Tensor", "torch.nn.parameter Parameter", "torch.nn.parameter Buffer"):
            raise NotData(f"it holds a tensor of the class {kind.name.replace(' ', '.')[:80]}")
        return _CALLS[function.name](self, *arguments)


def _flagged(tensor: LazyTensor, requires_grad: bool, parameter: bool) -> LazyTensor:
    return LazyTensor(tensor.dtype, tensor.shape, tensor.read, tensor.identity, requires_grad, parameter)


def _set(target: Any, key: Any, value: Any) -> None:
    if not isinstance(target, dict):
        raise NotData("it sets an item of something that is no dict")
    target[key] = value


def _global(name: str) -> Any:
    module, _, last = name.partition(" ")
    if module == "torch" and last in DTYPES:
        return TorchValue("dtype", last)
    is_storage = module == "torch" and last in _STORAGES
    if not is_storage and name not in _CALLS and name not in _TYPES:
        raise NotData(f"it refers to {name.replace(' ', '.')[:80]}")
    return Global(name)


def _encode(_: Any, text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise NotData(f"it encodes text as {str(encoding)[:20]}")
    return str.encode(text, encoding)


def _numpy_scalar(_: Any, dtype: _NumpyDType, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if dtype.code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise NotData(f"it holds a NumPy scalar of type {str(dtype.code)[:20]}")
    if dtype.order not in ("<", "|"):
        raise NotData("it holds a big-endian NumPy scalar")
    [item] = np.frombuffer(raw, dtype=f"<{dtype.code}").tolist()
    return item


def _size(_: Any, lengths: Any) -> TorchValue:
    if any(type(n) is not int or not 0 <= n < 2**63 for n in lengths):
        raise NotData("it holds a torch.Size that cannot be")
    return TorchValue("Size", tuple(lengths))


def _device(_: Any, kind: str, index: int | None = None) -> TorchValue:
    name = kind if index is None else f"{kind}:{index}"
    if not DEVICE.fullmatch(name):
        raise NotData("it holds a torch.device that cannot be")
    return TorchValue("device", name)


def _ordered(_: Any, pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((key, value) for key, value in pairs)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _Interpreter.tensor_v2,
    "torch._utils _rebuild_tensor_v3": _Interpreter.tensor_v3,
    "torch._utils _rebuild_parameter": _Interpreter.parameter,
    "torch._tensor _rebuild_from_type_v2": _Interpreter.from_type,
    "collections OrderedDict": _ordered,
    "_codecs encode": _encode,
    "__builtin__ set": lambda _, items: set(items),
    "builtins set": lambda _, items: set(items),
    "__builtin__ bytes": lambda _: b"",
    "builtins bytes": lambda _: b"",
    "torch Size": _size,
    "torch device": _device,
    "numpy dtype": lambda _, code, *flags: _NumpyDType(code),
    "numpy._core.multiarray scalar": _numpy_scalar,
    "numpy.core.multiarray scalar": _numpy_scalar,
}
_TYPES = {
    "torch Tensor",
    "torch.nn.parameter Parameter",
    "torch.nn.parameter Buffer",
    "torch.storage UntypedStorage",
    "torch UntypedStorage",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
