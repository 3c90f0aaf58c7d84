"""Writes scripts that show one finding each, and nothing else."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from tritorch.testing.findings import KINDS, Finding
from tritorch.testing.parts import Request

_SCRIPT = '''"""{title}

{message}
"""

import sys

import tritorch

if __name__ == "__main__":
    # in a process of its own, with every access watched
    report = tritorch.check(
{arguments}
    )
    print(report)
    sys.exit(0 if report.ok else 1)
'''


def write(folder: Path, request: Request, finding: Finding, *, pinned: bool) -> Path:
    """A script in `folder` that runs the case of a finding alone; its path.

    pinned: the request's inputs are the smallest that show the finding, so all their cases run.
    """
    place = f"{finding.file}:{finding.line}" if finding.line else finding.file
    title = f"{finding.kind}" + (f" at {place}" if place else "") + f": {KINDS[finding.kind]}."
    arguments: dict[str, object] = {
        "fn": request.target,
        "reference": request.reference or None,
        "samples": request.inputs or None,
        "level": request.level,
        "seed": request.seed,
        # smaller sizes are other cases
        "case": "" if pinned else request.case,
        "contract": request.contract,
        "targets": request.targets if finding.kind in _COMPILED else (),
    }
    for name in ("dtypes", "gradients", "mutates", "non_finite", "accuracy"):
        value = getattr(request, name)
        if value:
            arguments[name] = value
    if dtypes := arguments.pop("dtypes", None):
        assert isinstance(dtypes, tuple)
        shown = ", ".join(f"tritorch.{dtype}" for dtype in dtypes)
        arguments["dtypes"] = _Code(f"({shown},)")
    text = _SCRIPT.format(
        title=_escaped(title),
        message=_escaped(finding.message),
        arguments="\n".join(
            f"        {name}={value!r}," for name, value in arguments.items() if value is not None
        ),
    )
    key = "/".join(str(part) for part in (*finding.key, request.target, request.seed))
    slug = re.sub(r"[^a-z0-9]+", "_", finding.kind.lower())
    path = folder / f"repro_{slug}_{zlib.crc32(key.encode()) & 0xFFFF:04x}.py"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != text and not _is_ours(path):
        raise FileExistsError(f"{path} is no reproduction: name another folder")
    path.write_text(text, encoding="utf-8")
    return path


_COMPILED = frozenset(("compilation", "resources", "tf32"))


class _Code(str):
    """An expression, shown as it is."""

    def __repr__(self) -> str:
        return str(self)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _is_ours(path: Path) -> bool:
    return "tritorch.check(" in path.read_text(encoding="utf-8")
