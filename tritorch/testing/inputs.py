"""What the arguments of a function look like, in a line of text.

    x[M, K] weight[N, K%16] index[M]:int64<K eps=1e-5 shape=(M, 2) N=64

A tensor is a name and its sizes: a letter stands for any size, the same letter for the same one, a
number for itself; `K%16` says that only multiples of 16 are meant.  A dtype behind a colon is that
tensor's in every case, others have the dtype under test; `<K` bounds integers from above, 0 is
their least.  `eps=1e-5` is an argument that is no tensor: a Python literal, which may name letters
to have their numbers.  `N=64` fixes a letter that occurs as a size.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample
from tritorch.testing.errors import RequestError

Sizes = Mapping[str, int]

_TENSOR = re.compile(r"(?P<name>\w+)\[(?P<sizes>[^\]]*)\](?::(?P<dtype>\w+)(?:<(?P<bound>\w+))?)?")
_VALUE = re.compile(r"(?P<name>\w+)=(?P<value>\([^)]*\)|\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s]+)")
_SIZE = re.compile(r"(?P<size>\w+)(?:%(?P<multiple>\d+))?")


@dataclass(frozen=True)
class TensorInput:
    """One tensor: letters or numbers for its sizes, the dtype if it always has one, its bound."""

    name: str
    sizes: tuple[str | int, ...]
    dtype: torch.dtype | None = None
    bound: str | int | None = None

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The sizes with the letters' values."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.sizes)


@dataclass(frozen=True)
class Inputs:
    """What `parse` makes of the text."""

    text: str
    tensors: tuple[TensorInput, ...]
    values: dict[str, Argument]
    # all arguments by name, in the order of the text
    names: tuple[str, ...]
    # the values that name letters
    sized: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)

    @property
    def letters(self) -> tuple[str, ...]:
        """The sizes to choose, in the order in which they occur."""
        found = [s for tensor in self.tensors for s in tensor.sizes if isinstance(s, str)]
        return tuple(letter for letter in dict.fromkeys(found) if letter not in self.fixed)

    def samples(self, choices: Iterable[Sizes]) -> Callable[[Maker], Iterator[Sample]]:
        """What a `Subject` takes: one sample for each choice of sizes, named by it."""
        chosen = [dict(sizes) for sizes in choices]

        def make_samples(make: Maker) -> Iterator[Sample]:
            for sizes in chosen:
                yield self.sample(sizes, make)

        return make_samples

    def sample(self, sizes: Sizes, make: Maker) -> Sample:
        """One call."""
        whole = {**self.fixed, **sizes}
        made: dict[str, Any] = {t.name: _tensor(t, whole, make) for t in self.tensors}
        made |= self.values
        made |= {name: _with_sizes(text, whole) for name, text in self.sized.items()}
        return Sample(self.name(sizes), **{name: made[name] for name in self.names})

    def name(self, sizes: Sizes) -> str:
        """How a sample is called: "M=33 K=17"."""
        shown = sizes or self.fixed
        return " ".join(f"{letter}={size}" for letter, size in shown.items()) or "as given"

    def pinned(self, sizes: Sizes) -> str:
        """The same text with the letters' values, which reproduces one case."""
        return " ".join([self.text, *(f"{letter}={size}" for letter, size in sizes.items())])

    def elements(self, sizes: Sizes) -> int:
        """Elements of the largest tensor."""
        whole = {**self.fixed, **sizes}
        return max((math.prod(tensor.shape(whole)) for tensor in self.tensors), default=0)

    def allowed(self, letter: str, size: int) -> int:
        """The nearest size, not below 1 multiple, that the letter's `%` allows."""
        multiple = self.multiples.get(letter, 1)
        return max(multiple, round(size / multiple) * multiple) if size else 0


def parse(text: str, fn: Callable[..., Any] | None = None) -> Inputs:
    """Reads the text of the module's description.

    Raises RequestError: says what could not be read, and with `fn` which parameter is missing.
    """
    tensors: list[TensorInput] = []
    words: dict[str, str] = {}
    names: list[str] = []
    multiples: dict[str, int] = {}
    rest = text
    while rest := rest.lstrip(" ,;\n"):
        if match := _TENSOR.match(rest):
            tensors.append(_tensor_input(match, multiples))
        elif match := _VALUE.match(rest):
            words[match["name"]] = match["value"]
        else:
            raise RequestError(
                "inputs: expects tensors such as x[M, K] and values such as eps=1e-5, "
                f"received {rest.split()[0]!r}"
            )
        if match["name"] in names:
            raise RequestError(f"inputs: {match['name']} occurs twice")
        names.append(match["name"])
        rest = rest[match.end() :]
    letters = {size for tensor in tensors for size in tensor.sizes if isinstance(size, str)}
    sized = {name: word for name, word in words.items() if _names_sizes(word, letters)}
    values = {name: _literal(word) for name, word in words.items() if name not in sized}
    fixed: dict[str, int] = {}
    for name in letters & values.keys():
        value = values.pop(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"inputs: the size {name} must be a number, received {value!r}")
        fixed[name] = value
    for tensor in tensors:
        if isinstance(tensor.bound, str) and tensor.bound not in letters:
            raise RequestError(f"inputs: {tensor.name} is bounded by {tensor.bound}, no size")
    if not tensors:
        raise RequestError("inputs: there is no tensor among the arguments")
    arguments = tuple(name for name in names if name not in fixed)
    found = Inputs(text, tuple(tensors), values, arguments, sized, fixed, multiples)
    if fn is not None:
        _check_signature(fn, found)
    return found


def _tensor_input(match: re.Match[str], multiples: dict[str, int]) -> TensorInput:
    sizes: list[str | int] = []
    for part in filter(None, (part.strip() for part in match["sizes"].split(","))):
        size = _SIZE.fullmatch(part)
        if size is None:
            raise RequestError(f"inputs: {match['name']} has the size {part!r}")
        sizes.append(int(size["size"]) if size["size"].isdigit() else size["size"])
        if size["multiple"]:
            if int(size["multiple"]) < 1:
                raise RequestError(f"inputs: {match['name']} has the size {part!r}")
            multiples[size["size"]] = max(int(size["multiple"]), multiples.get(size["size"], 1))
    dtype = None
    if match["dtype"]:
        dtype = getattr(torch, match["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise RequestError(f"inputs: {match['name']} has the unknown dtype {match['dtype']!r}")
    bound = match["bound"]
    limit = int(bound) if bound and bound.isdigit() else bound
    return TensorInput(match["name"], tuple(sizes), dtype, limit)


def _literal(text: str) -> Argument:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text.startswith("torch."):
        dtype = getattr(torch, text.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    try:
        value: Argument = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # an unquoted word
        return text
    return value


def _names_sizes(text: str, letters: Collection[str]) -> bool:
    """Whether a value is made of letters: one, or a tuple or list with some."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return bool(names) and names <= set(letters)


def _with_sizes(text: str, sizes: Sizes) -> Argument:
    class Numbers(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.copy_location(ast.Constant(sizes[node.id]), node)

    value: Argument = ast.literal_eval(Numbers().visit(ast.parse(text, mode="eval")))
    return value


def _check_signature(fn: Callable[..., Any], inputs: Inputs) -> None:
    given = set(inputs.names)
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(given - parameters.keys())
    missing = [
        name
        for name, p in parameters.items()
        if name not in given
        and p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unknown or missing:
        shown = ", ".join(parameters)
        what = "no argument " + ", ".join(missing) if missing else "unknown " + ", ".join(unknown)
        raise RequestError(f"inputs: {what}: {getattr(fn, '__name__', fn)} takes {shown}")


def _tensor(tensor: TensorInput, sizes: Sizes, make: Maker) -> Tensor:
    shape = tensor.shape(sizes)
    dtype = tensor.dtype
    if dtype is None:
        return make(*shape)
    if dtype.is_floating_point:
        return make(*shape).to(dtype)
    bound = sizes[tensor.bound] if isinstance(tensor.bound, str) else tensor.bound
    return make.classes(*shape, count=2 if bound is None else bound, dtype=dtype)
