"""Who may import whom, who claims which kernel, and how long a file may be.

The files are read, not run, so that a broken import is reported with its place and its rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("kernels", "tritorch", "bench", "tests", "examples")


class Room(NamedTuple):
    """Files under one rule, as lists of names; a name stands for itself and all below it.

    `lazily`: what only a function may import. `never`: exceptions from `may`. `unused`: what no
    line may say, however the file came by it. "stdlib" stands for the whole standard library.
    """

    files: str
    rule: str
    may: str
    lazily: str = ""
    never: str = ""
    unused: str = ""


# the first room whose pattern fits a file is its room
ROOMS = (
    Room(
        "kernels/*.py",
        "device code imports triton and its siblings, chooses no configuration and prints nothing",
        may="functools triton tritorch.kernels",
        unused="autotune triton.autotune print tl.device_print tl.static_print",
    ),
    Room(
        "tritorch/ops/*.py",
        "an op imports torch, the core and its siblings; binding alone registers ops with torch",
        may="__future__ collections dataclasses functools math typing torch tritorch.backend"
        " tritorch.binding tritorch.checks tritorch.descriptors tritorch.hardware tritorch.launch"
        " tritorch.ops tritorch.registry tritorch.repeats.decorator tritorch.subclasses",
        never="torch.library",
        unused="torch.library",
    ),
    Room(
        "tritorch/nn/*.py",
        "a layer imports torch and ops, which check and launch for it",
        may="stdlib torch tritorch.nn tritorch.ops",
        unused="torch.library",
    ),
    Room(
        "tritorch/registry.py tritorch/backend.py tritorch/checks.py tritorch/protocols.py"
        " tritorch/subclasses.py",
        "a leaf knows no op and no triton",
        may="stdlib torch",
        unused="torch.library",
    ),
    Room(
        "tritorch/launch.py",
        "launch knows no op, and imports triton when the first kernel is launched",
        may="stdlib torch tritorch.backend tritorch.bound tritorch.hardware"
        " tritorch.protocols tritorch.testing.dry tritorch.testing.interpreter tritorch.tuned",
        lazily="triton",
        unused="torch.library",
    ),
    Room(
        "tritorch/bound.py",
        "what is bound for launch knows no op, and asks triton when a kernel is compiled",
        may="stdlib",
        lazily="triton",
    ),
    Room(
        "tritorch/hardware.py",
        "what kernels are compiled for knows no op and no triton",
        may="stdlib torch tritorch.backend tritorch.testing.dry",
        unused="torch.library",
    ),
    Room(
        "tritorch/descriptors.py",
        "a descriptor knows no op, and imports triton when the first one is made",
        may="stdlib torch",
        lazily="triton",
    ),
    Room(
        "tritorch/tuned.py",
        "a table of choices knows no op, and imports triton when a choice is read",
        may="stdlib torch tritorch.backend tritorch.testing.dry",
        lazily="triton",
    ),
    Room(
        "tritorch/binding.py",
        "binding ties any op to torch and knows none",
        may="stdlib torch tritorch.launch tritorch.repeats",
    ),
    Room(
        "tritorch/repeats/listener.py tritorch/repeats/seen.py tritorch/repeats/watched.py",
        "what is repeated knows no op, and nothing of autograd",
        may="stdlib torch tritorch.backend tritorch.checks tritorch.descriptors tritorch.launch"
        " tritorch.repeats.listener tritorch.repeats.watched",
        unused="torch.library torch.autograd.Function",
    ),
    Room(
        "tritorch/repeats/*.py",
        "what is repeated under autograd knows no op",
        may="stdlib torch tritorch.binding tritorch.launch tritorch.repeats tritorch.subclasses",
        unused="torch.library",
    ),
    Room(
        "pytest_tritorch.py",
        "the fixture costs a run nothing that does not use it",
        may="stdlib pytest",
        lazily="tritorch",
    ),
    Room(
        "tritorch/testing/*.py",
        "testing works without pytest, and imports triton when it is used",
        may="stdlib numpy torch"
        " tritorch.backend tritorch.launch tritorch.registry tritorch.testing",
        lazily="triton tritorch.ops",
    ),
    Room("tritorch/data/make_digits.py", "a script run by hand", may="stdlib numpy sklearn"),
    Room("tritorch/data/*.py", "data knows no op", may="stdlib numpy torch"),
    Room(
        "tritorch/cli/*.py tritorch/doctor/*.py tritorch/training/train.py",
        "programs use what a user has, and record where their results come from",
        may="stdlib click numpy rich torch tritorch",
        lazily="matplotlib triton",
        never="tritorch.binding tritorch.descriptors tritorch.hardware tritorch.kernels"
        " tritorch.launch",
    ),
    Room(
        "tritorch/*.py",
        "the public modules are made of torch, ops and layers",
        may="stdlib torch tritorch",
        never="tritorch.bench tritorch.binding tritorch.descriptors tritorch.hardware"
        " tritorch.kernels tritorch.launch",
        unused="torch.library",
    ),
    Room(
        "bench/*.py",
        "measurements use all of tritorch, never its tests",
        may="stdlib numpy torch tritorch",
        lazily="click matplotlib rich triton",
    ),
)


def within(module: str, names: str) -> bool:
    top = module.split(".")[0]
    return any(
        module == name
        or module.startswith(f"{name}.")
        or (name == "stdlib" and top in sys.stdlib_module_names)
        for name in names.split()
    )


def room_of(file: str) -> Room | None:
    fits = (room for room in ROOMS if any(fnmatch(file, one) for one in room.files.split()))
    return next(fits, None)


def sources() -> dict[str, str]:
    """Every Python file of the checkout by its path from the root, each once."""
    files = sorted(ROOT.glob("*.py"))
    files += [file for top in FOLDERS for file in sorted((ROOT / top).rglob("*.py"))]
    paths = {file.relative_to(ROOT).as_posix(): file for file in files}
    # the links to kernels/ and bench/
    links = ("tritorch/kernels/", "tritorch/bench/")
    return {path: file.read_text() for path, file in paths.items() if not path.startswith(links)}


def imports(file: str, tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line, full name, and whether importing the file runs it, of every import.

    `from a import b` counts as `a.b`: whether b is a module or a name in one, the rules agree.
    """
    package = file.split("/")[:-1]
    if package[:1] in (["kernels"], ["bench"]):
        package.insert(0, "tritorch")
    later = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) not in later
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *filter(None, [node.module])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name]), id(node) not in later


def violations(file: str, source: str) -> list[str]:
    """What the file does that its room forbids: "file:line: what (rule)"."""
    room, tree = room_of(file), ast.parse(source)
    if room is None:
        return []
    found = []
    for line, module, at_import in imports(file, tree):
        if within(module, room.never) or not within(module, f"{room.may} {room.lazily}"):
            found.append((line, f"imports {module}"))
        elif at_import and within(module, room.lazily):
            found.append((line, f"imports {module} outside a function"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in room.unused.split():
            found.append((node.lineno, f"uses {ast.unparse(node)}"))
    return [f"{file}:{line}: {what} ({room.rule})" for line, what in found]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.files.replace(" ", ","))
def test_room_imports_only_what_it_may(room):
    found = [
        violation
        for file, source in sources().items()
        if room_of(file) is room
        for violation in violations(file, source)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "reported"),
    [
        ("kernels/conv.py", "import triton\nimport torch", "kernels/conv.py:2: imports torch ("),
        ("kernels/conv.py", "from math import pi", "kernels/conv.py:1: imports math.pi ("),
        ("kernels/conv.py", "@triton.autotune([])\ndef f(): ...", "uses triton.autotune"),
        ("kernels/conv.py", "\nprint(1)", "kernels/conv.py:2: uses print"),
        ("tritorch/ops/conv.py", "import os", "imports os"),
        ("tritorch/ops/conv.py", "from torch import library", "imports torch.library"),
        ("tritorch/ops/conv.py", "torch.library.define('x')", "uses torch.library"),
        ("tritorch/ops/conv.py", "def f():\n    import triton", "conv.py:2: imports triton"),
        ("tritorch/ops/conv.py", "from ..nn import Linear", "imports tritorch.nn.Linear"),
        ("tritorch/ops/conv.py", "from tritorch.kernels import conv", "imports tritorch.kernels"),
        ("tritorch/nn/__init__.py", "from tritorch import launch", "imports tritorch.launch"),
        ("tritorch/registry.py", "import tritorch.ops.conv", "imports tritorch.ops.conv"),
        ("tritorch/launch.py", "import triton", "imports triton outside a function"),
        ("tritorch/testing/check.py", "def f():\n    import pytest", "imports pytest"),
        ("tritorch/optim.py", "from tests import conftest", "imports tests.conftest"),
        ("tritorch/optim.py", "from tritorch.bench import environment", "imports tritorch.bench"),
        ("bench/timing.py", "from kernels import conv", "imports kernels.conv"),
    ],
)
def test_forbidden_import_is_reported_with_its_place(file, source, reported):
    assert reported in "\n".join(violations(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/conv.py", "import triton.language as tl\nfrom tritorch.kernels.tiles import f"),
        ("tritorch/ops/conv.py", "import torch.nn.functional as F\nfrom . import strided"),
        ("tritorch/launch.py", "import json\ndef f():\n    import triton"),
        ("tritorch/testing/dry.py", "if TYPE_CHECKING:\n    import triton"),
        ("tritorch/cli/train.py", "from tritorch.bench.environment import write_result"),
    ],
)
def test_permitted_import_is_not_reported(file, source):
    assert violations(file, source) == []


def is_jit(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function) in ("jit", "triton.jit")


def defined_kernels() -> dict[str, str]:
    """Place of every kernel by its name in a spec, "family.kernel_name"."""
    return {
        f"{Path(file).stem}.{node.name}": f"{file}:{node.lineno}"
        for file, source in sources().items()
        if file.startswith("kernels/")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(map(is_jit, node.decorator_list))
    }


def test_every_kernel_is_claimed_by_a_spec():
    import tritorch.ops  # noqa: F401  (registers the specs)
    from tritorch.registry import specs

    claimed = {name for spec in specs() for name in spec.kernels}
    unclaimed = [
        f'{place}: no OpSpec claims it; add "{name}" to `kernels` of a spec in tritorch/ops/'
        for name, place in defined_kernels().items()
        if name not in claimed
    ]
    assert defined_kernels()
    assert not unclaimed, "\n".join(unclaimed)


def test_every_claimed_kernel_exists():
    import tritorch.ops  # noqa: F401  (registers the specs)
    from tritorch.registry import specs

    missing = [
        f"{spec.name} claims {name}, which kernels/{name.split('.')[0]}.py does not define"
        for spec in specs()
        for name in spec.kernels
        if name not in defined_kernels()
    ]
    assert not missing, "\n".join(missing)


def test_every_family_is_imported_by_ops():
    families = {
        Path(file).stem
        for file, source in sources().items()
        if fnmatch(file, "tritorch/ops/*.py")
        for node in ast.parse(source).body
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("register(")
    }
    init = "tritorch/ops/__init__.py"
    imported = {name for _, name, _ in imports(init, ast.parse(sources()[init]))}
    forgotten = [
        f"{init}: add `from tritorch.ops.{family} import ...`, or its specs are never seen"
        for family in sorted(families)
        if not any(within(name, f"tritorch.ops.{family}") for name in imported)
    ]
    assert families
    assert not forgotten, "\n".join(forgotten)


# what a reader keeps in mind at once
MOST_LINES = 400


def test_no_file_is_longer_than_400_lines():
    """A longer one is about two things: it is split where they part, never squeezed."""
    lengths = {file: len(source.splitlines()) for file, source in sources().items()}
    long = [
        f"{file}: {length} lines, the limit is {MOST_LINES}"
        for file, length in lengths.items()
        if length > MOST_LINES
    ]
    assert lengths
    assert not long, "\n".join(long)
