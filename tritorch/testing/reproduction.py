"""Writes scripts that show one finding each, and nothing else."""

from __future__ import annotations

import itertools
import os
import re
import zlib
from pathlib import Path

from tritorch.testing.findings import KINDS, Finding
from tritorch.testing.parts import LIMITS
from tritorch.testing.requests import Request
from tritorch.testing.steps import Words

_SCRIPT = '''"""{title}

{message}

{mark}
"""

import sys

{path}import tritorch

# the property, and the one call that breaks it
CASE = {case}

# kind, kernel and argument
FINDING = {finding!r}

if __name__ == "__main__":
    # in a process of its own, with every access watched
    report = tritorch.check(
{arguments}
    )
    print(report)
    found = [(one.kind, one.kernel, one.argument) for one in report.findings]
    # 2: the same case shows something else
    sys.exit(1 if FINDING in found else 0 if report.ok else 2)
'''


def sign(finding: Finding) -> tuple[str, str, str]:
    """What a finding is known by in another process, and when its lines have moved."""
    return finding.kind, finding.kernel, finding.argument


def write(folder: Path, request: Request, finding: Finding, step: Words, *, timeout: float) -> Path:
    """A script in `folder` that runs the case of a finding alone; its path.

    step: the case in words.  timeout: seconds, for what hangs.  The script runs in any folder, and
    no other file is replaced.
    """
    place = f"{finding.file}:{finding.line}" if finding.line else finding.file
    title = f"{finding.kind}" + (f" at {place}" if place else "") + f": {KINDS[finding.kind]}."
    arguments: dict[str, object] = {
        "fn": _whole(request.target),
        "reference": _whole(request.reference) or None,
        "samples": _whole(request.inputs) or None,
        # of which samples there are, not which is tried
        "level": request.level if step["section"] == LIMITS else None,
        "seed": request.seed if request.seed else None,
        "case": _Code("CASE"),
        "contract": request.contract,
        "targets": request.targets if step["section"] == LIMITS else (),
        "device": request.device if request.device != "cpu" else None,
        "timeout": timeout if finding.kind == "hang" else None,
    }
    for name in ("gradients", "mutates", "non_finite", "accuracy"):
        arguments[name] = getattr(request, name)
    if request.dtypes:
        shown = ", ".join(f"tritorch.{dtype}" for dtype in request.dtypes)
        arguments["dtypes"] = _Code(f"({shown},)")
    text = _SCRIPT.format(
        title=_escaped(title),
        message=_escaped(finding.message),
        mark=_MARK,
        path=_path(request),
        case="\n".join(["{", *(f"    {key!r}: {value!r}," for key, value in step.items()), "}"]),
        finding=sign(finding),
        arguments="\n".join(
            f"        {name}={value!r}," for name, value in arguments.items() if value is not None
        ),
    )
    key = "/".join(str(part) for part in (*finding.key, request.target, request.seed))
    slug = re.sub(r"[^a-z0-9]+", "_", finding.kind.lower())
    stem = f"repro_{slug}_{zlib.crc32(key.encode()):08x}"
    names = (stem if count == 1 else f"{stem}_{count}" for count in itertools.count(1))
    paths = (folder / f"{name}.py" for name in names)
    path = next(path for path in paths if not path.exists() or _is_ours(path))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


_MARK = "Written by `tritorch check --repro`, which writes it anew."


class _Code(str):
    """An expression, shown as it is."""

    def __repr__(self) -> str:
        return str(self)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _whole(name: str) -> str:
    """A name of a function with the whole path of its file; other text as it is."""
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or "[" in name:
        return name
    return f"{Path(file).resolve()}:{function}"


def _path(request: Request) -> str:
    """The line that finds modules which were found in the folder that the check was run in."""
    names = (request.target, request.reference)
    if all(":" not in name or name.rpartition(":")[0].endswith(".py") for name in names):
        return ""
    return f"sys.path.insert(0, {os.getcwd()!r})\n\n"


def _is_ours(path: Path) -> bool:
    return path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace")
