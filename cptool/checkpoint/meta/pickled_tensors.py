"""The tensors that the pickle of a `torch.save` names, without running it.

A pickle is a program for a small machine that may call any function. The machine here knows the
instructions that `torch.save` writes for a dictionary of tensors and no others: it makes numbers,
strings, tuples and dictionaries, and three calls, which are carried out on values of its own. No
instruction creates an instance or changes anything but a dictionary or a list of this run. Sizes
are bounded before anything is made of them.
"""

import enum
import pickletools
from typing import Any, NamedTuple

from cptool.checkpoint.fields import readable

# Llama 3.1 405B takes 60,000.
_MAX_INSTRUCTIONS = 1_000_000

_MAX_NAME = 1000

_ENCODINGS = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}


class PickledStorage(NamedTuple):
    """Type name, key of the record and number of elements of a run of bytes."""

    encoding: str
    key: str
    length: int


class PickledTensor(NamedTuple):
    """A tensor as a pickle describes it; offset and strides count elements."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Function(enum.Enum):
    TENSOR = "torch._utils._rebuild_tensor_v2"
    PARAMETER = "torch._utils._rebuild_parameter"
    DICTIONARY = "collections.OrderedDict"


class _StorageType(NamedTuple):
    encoding: str


_MARK = object()

# Instructions that push the constant or the argument that they carry.
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = frozenset(
    """
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    """.split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NO_EFFECT = frozenset(["PROTO", "FRAME"])


def read_tensors(pickled: bytes) -> dict[str, PickledTensor]:
    """Return the tensors by name; ValueError for anything that is not a dictionary of tensors."""
    state = _Machine().run(pickled)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, PickledTensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    return state


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """Return the value of a pickle."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(pickled)):
            if count > _MAX_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                return self.pop()
            self.step(instruction.name, argument)
        raise ValueError("its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError(f"its pickle refers to value {argument}, which it does not have")
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.to_mark()
            self.set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.to_mark()
            self.top(list).extend(items)
        elif name == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(str), self.pop(str)
            stack.append(_known(module, attribute))
        elif name == "BINPERSID":
            stack.append(_storage(self.pop(tuple)))
        elif name == "REDUCE":
            arguments, function = self.pop(tuple), self.pop(_Function)
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            # The attributes of a dictionary of tensors, such as versions of modules: left out.
            self.pop()
            self.top(dict)
        elif name not in _NO_EFFECT:
            raise ValueError(f"its pickle has an instruction {name}, which no tensor needs")

    def pop(self, kind: type = object) -> Any:
        """Remove and return the last value, which is of a type `kind`."""
        value = self.top(kind)
        del self.stack[-1]
        return value

    def top(self, kind: type = object) -> Any:
        """Return the last value, which is of a type `kind`; else raise ValueError."""
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle takes a value that is not there")
        value = self.stack[-1]
        # An exact type: what a call returns is a tuple to Python too.
        if kind is not object and type(value) is not kind:
            raise ValueError(f"its pickle takes a {type(value).__name__} for a {kind.__name__}")
        return value

    def to_mark(self) -> list[Any]:
        """Remove and return the values after the last mark."""
        items: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        raise ValueError("its pickle takes values up to a mark that is not there")

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, which alternate, in the last value."""
        if len(items) % 2:
            raise ValueError("its pickle sets a key without a value")
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or len(key) > _MAX_NAME:
                raise ValueError(
                    f"its pickle has a key that is a {type(key).__name__}, not the name of a tensor"
                )
            target[key] = value


def _known(module: str, name: str) -> Any:
    for function in _Function:
        if function.value == f"{module}.{name}":
            return function
    if module == "torch" and name.endswith("Storage") and len(name) < 40:
        return _StorageType(_ENCODINGS.get(name, name))
    raise ValueError(f"it refers to {readable(f'{module}.{name}')}, which no tensor needs")


def _storage(identity: tuple[Any, ...]) -> PickledStorage:
    if len(identity) != 5 or identity[0] != "storage":
        raise ValueError("it refers to something that is not the storage of a tensor")
    _, kind, key, _, length = identity
    if not (
        type(kind) is _StorageType
        and type(key) is str
        and len(key) <= _MAX_NAME
        and type(length) is int
        and 0 <= length < 2**63
    ):
        raise ValueError("its description of a tensor's storage is malformed")
    return PickledStorage(kind.encoding, key, length)


def _call(function: _Function, arguments: tuple[Any, ...]) -> Any:
    if function is _Function.DICTIONARY and not arguments:
        return {}
    if function is _Function.PARAMETER and arguments and type(arguments[0]) is PickledTensor:
        return arguments[0]
    if function is _Function.TENSOR and len(arguments) >= 4:
        storage, offset, shape, stride = arguments[:4]
        if (
            type(storage) is PickledStorage
            and type(shape) is type(stride) is tuple
            and type(offset) is int
            and 0 <= offset < 2**63
        ):
            return PickledTensor(storage, offset, shape, stride)
    raise ValueError("a tensor is not described as one")
