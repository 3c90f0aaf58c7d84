"""What the arguments of a function look like, in a line of text, and the sizes to try it with.

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
import itertools
import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample
from tritorch.testing import calls
from tritorch.testing.errors import RequestError

Sizes = Mapping[str, int]

_TENSOR = re.compile(r"(?P<name>\w+)\[(?P<sizes>[^\]]*)\](?::(?P<dtype>\w+)(?:<(?P<bound>\w+))?)?")
_VALUE = re.compile(r"(?P<name>\w+)=(?P<value>\([^)]*\)|\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s]+)")
_SIZE = re.compile(r"(?P<size>\w+)(?:%(?P<multiple>\d+))?")
# elements of one tensor that the interpreter goes through in a moment
_MOST = {"quick": 1 << 14, "full": 1 << 17, "soak": 1 << 19}
# times as many, where a tile is that large
_BEYOND = 4
# small, different from each other, and no multiples of each other
_SMALL = (5, 3, 7, 2, 11, 13)


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


def tile_sizes(launches: Iterable[Any]) -> tuple[int, ...]:
    """The sizes of tiles that launches used: their constants that look like one, ascending.

    `launches` have `constants`, as the detectors and the dry driver record them.
    """
    named: set[int] = set()
    others: set[int] = set()
    for launch in launches:
        for name, value in launch.constants.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 1 << 16:
                continue
            is_tile = re.search(r"block|tile|chunk|^b[a-z]$", name, re.IGNORECASE) is not None
            if is_tile:
                named.add(value)
            elif value & (value - 1) == 0 and not re.search(
                r"warp|stage|group|num|split", name, re.IGNORECASE
            ):
                others.add(value)
    return tuple(sorted(named or others))


def sizes_around(tiles: Sequence[int], level: str) -> tuple[int, ...]:
    """Sizes at the edges of tiles: 1, one less, the tile, one more, just over two."""
    edges = {1}
    chosen = tiles if level != "quick" else sorted({*tiles[:1], *tiles[-1:]})
    for tile in chosen:
        edges |= {tile, tile + 1}
        if level != "quick":
            edges |= {tile - 1, 2 * tile - 1, 2 * tile + 1}
    return tuple(sorted(edges - {0}))


def choices(inputs: Inputs, tiles: Sequence[int], level: str, seed: int) -> list[dict[str, int]]:
    """The sizes to try, the most telling first: each size in turn crosses every edge.

    One size is varied while the others are small, because the interpreter's time goes with the
    number of programs; then all are beyond a tile, and beyond quick some are drawn at random.
    """
    letters = inputs.letters
    small = {
        letter: inputs.allowed(letter, size)
        for letter, size in zip(letters, itertools.cycle(_SMALL), strict=False)
    }
    found = [small]
    tiles = tiles or (16,)
    least = min(tiles)
    # beyond one tile in every direction, by another number in each
    found.append({letter: small[letter] + least for letter in letters})
    # a whole number of tiles tells least
    edges = sorted(
        sizes_around(tiles, level),
        key=lambda edge: (edge in tiles, edge != max(tiles) + 1, edge > 1, -edge),
    )
    for edge in edges:
        for letter in letters:
            found.append(small | {letter: edge})
    if level != "quick":
        found += [dict.fromkeys(letters, edge) for edge in edges]
        draw = random.Random(seed)
        most = 2 * max(tiles) + 1
        for _ in range(10 if level == "full" else 200):
            found.append({letter: draw.randint(1, min(most, 80)) for letter in letters})
    allowed = [
        {letter: inputs.allowed(letter, size) for letter, size in sizes.items()} for sizes in found
    ]
    kept = []
    for number, sizes in enumerate(allowed):
        # the second, beyond a tile in every direction, is left out where it is too large
        if number != 1 and inputs.elements(sizes) > _MOST[level]:
            # a size beyond a large tile is worth more than the others are
            longest = max(sizes, key=lambda letter: sizes[letter])
            ones = {letter: inputs.allowed(letter, 1) for letter in letters}
            sizes = ones | {longest: sizes[longest]}
        if inputs.elements(sizes) <= (1 if number < 2 else _BEYOND) * _MOST[level]:
            kept.append(sizes)
    unique = list({tuple(sizes.items()): sizes for sizes in kept or allowed[:1]}.values())
    return unique[: {"quick": 12, "full": 60, "soak": 400}[level]]


def apart(inputs: Inputs, taken: Iterable[Sizes]) -> dict[str, int]:
    """Small sizes none of which is taken, so that no cache can know them."""
    known = [dict(sizes) for sizes in taken]
    found: dict[str, int] = {}
    # of many dimensions smaller ones
    for least in (17, 9, 4):
        found = {}
        for letter in inputs.letters:
            used = {sizes.get(letter) for sizes in known} | set(found.values())
            candidates = (inputs.allowed(letter, size) for size in itertools.count(least))
            found[letter] = next(size for size in candidates if size not in used)
        if inputs.elements(found) <= _MOST["quick"]:
            break
    return found


def empties(inputs: Inputs) -> list[dict[str, int]]:
    """One choice of sizes for each letter that is 0."""
    small = dict(zip(inputs.letters, itertools.cycle(_SMALL), strict=False))
    small = {letter: inputs.allowed(letter, size) for letter, size in small.items()}
    # there is no index into nothing
    bounds = {tensor.bound for tensor in inputs.tensors}
    return [small | {letter: 0} for letter in inputs.letters if letter not in bounds]


# what functions of one to three tensors commonly look like; before each its more general forms
_COMMON = {
    1: ("{0}[M, N]", "{0}[N]", "{0}[N, C, H, W]", "{0}[B, M, N]"),
    2: (
        "{0}[M, K] {1}[K, N]",
        "{0}[M, K] {1}[N, K]",
        "{0}[M, N] {1}[M, N]",
        "{0}[N] {1}[N]",
        "{0}[M, N] {1}[N]",
        "{0}[M, V] {1}[M]:int64<V",
        "{0}[V, D] {1}[M]:int64<V",
        "{0}[M]:int64<V {1}[V, D]",
        "{0}[N, C, H, W] {1}[K, C, 3, 3]",
    ),
    3: (
        "{0}[M, K] {1}[K, N] {2}[N]",
        "{0}[M, K] {1}[N, K] {2}[N]",
        "{0}[B, H, M, D] {1}[B, H, N, D] {2}[B, H, N, D]",
        "{0}[M, N] {1}[M, N] {2}[M, N]",
        "{0}[M, N] {1}[N] {2}[N]",
        "{0}[N] {1}[N] {2}[N]",
    ),
}
_INDEX = re.compile(r"target|label|ind(ex|ices)|idx|ids?$|token", re.IGNORECASE)
_AFFINE = re.compile(r"weight|bias|gamma|beta|scale|shift|^[wb]$", re.IGNORECASE)


def guess(fn: Callable[..., Any], reference: Callable[..., Any]) -> str:
    """The first common description with which the reference works, those first that suit the names.

    Parameters with defaults keep them.  Raises ValueError where none fits.
    """
    parameters = inspect.signature(fn).parameters.values()
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    patterns = sorted(_COMMON.get(len(names), ()), key=lambda text: _unlikely(text, names))
    for pattern in patterns:
        text = pattern.format(*names)
        inputs = parse(text)
        sizes = dict(zip(inputs.letters, itertools.cycle(_SMALL), strict=False))
        arguments = inputs.sample(sizes, Maker(seed="guess")).arguments
        try:
            result = calls.outputs_of(calls.call(reference, arguments))
        except Exception:
            continue
        if result:
            return text
    raise RequestError(
        f"inputs: what {getattr(fn, '__name__', fn)}({', '.join(names)}) takes cannot be guessed: "
        "say what its arguments look like, for example 'x[M, K] weight[N, K] eps=1e-5'"
    )


def _unlikely(pattern: str, names: Sequence[str]) -> int:
    """How many of the names suggest another thing: a target is an index, a bias has no rows."""
    tensors = parse(pattern.format(*names)).tensors
    wrong = 0
    for tensor in tensors:
        wrong += (tensor.dtype is not None) != (_INDEX.search(tensor.name) is not None)
        broadcasts = tensor is not tensors[0] and _AFFINE.search(tensor.name) is not None
        wrong += broadcasts and tensor.sizes == tensors[0].sizes
    return wrong
