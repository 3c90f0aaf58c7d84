"""The sizes to try a function's arguments with: at the edges of its tiles, and few enough."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tritorch.testing.inputs import Inputs, Sizes

# elements of one tensor that the interpreter goes through in a moment
_MOST = {"quick": 1 << 14, "full": 1 << 17, "soak": 1 << 19}
# times as many, where a tile is that large
_BEYOND = 4
# small, different from each other, and no multiples of each other
SMALL = (5, 3, 7, 2, 11, 13)


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
        for letter, size in zip(letters, itertools.cycle(SMALL), strict=False)
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


def third_tiles(inputs: Inputs, tiles: Sequence[int]) -> Iterator[tuple[Sizes, Sizes, Sizes]]:
    """For each letter small sizes, those with it just beyond a tile, and with it in a third one.

    The first two, which are tried anyway, tell whether the third take too many programs.
    """
    small = choices(inputs, tiles, "quick", 0)[0]
    tile = max(tiles or (16,))
    for letter in inputs.letters:
        size = inputs.allowed(letter, 2 * tile + 1)
        size += inputs.multiples.get(letter, 1) if size <= 2 * tile else 0
        found = small | {letter: size}
        if inputs.elements(found) <= _MOST["quick"]:
            yield small, small | {letter: inputs.allowed(letter, tile + 1)}, found


def of_configuration(
    inputs: Inputs, own: Sequence[int], others: Iterable[int]
) -> list[dict[str, int]]:
    """The sizes for one of several configurations, whose tiles are `own`.

    Beyond a tile in every direction, then whole numbers of its tile and of `others`, for which a
    mask may be left out: of one tile in as many directions as are small enough.
    """
    beyond = choices(inputs, own, "quick", 0)[1:2]
    ones = {letter: inputs.allowed(letter, 1) for letter in inputs.letters}
    whole = []
    for tile in dict.fromkeys((max(own), *others)):
        sizes = ones
        for letter in reversed(inputs.letters):
            wider = sizes | {letter: inputs.allowed(letter, tile)}
            if inputs.elements(wider) <= (_BEYOND if sizes is ones else 1) * _MOST["quick"]:
                sizes = wider
        whole.append(sizes)
    return beyond + whole


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
    small = dict(zip(inputs.letters, itertools.cycle(SMALL), strict=False))
    small = {letter: inputs.allowed(letter, size) for letter, size in small.items()}
    # there is no index into nothing
    bounds = {tensor.bound for tensor in inputs.tensors}
    return [small | {letter: 0} for letter in inputs.letters if letter not in bounds]
