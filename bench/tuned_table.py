"""A table of measured configurations while it is written: the user's, or one that is shipped.

    {"schema": 1, "kind": "tuned", "environments": [{...}, ...], "rows": [{...}, ...]}

Every run that adds rows adds its environment, and all are of one GPU; `environment` of a row is the
index of that which it was measured in.  `function`, `sizes` and the configuration are what
`tritorch.tuned` reads; `kwargs` is null where the function by itself leaves a call to another
kernel, and that was the fastest.  `calls` are the library calls that asked: `own_us` and
`median_us` are the microseconds of the kernel's own choice and of the row's configuration in each,
and those of the row are their means.  So many `candidates` were timed, the own choice among them;
`refused` says which were not, and why.  An environment that has a `source` has its times from that
result file, whose cases are its calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritorch import tuned
from tritorch.bench.environment import SCHEMA, Json, environment, write_whole


class TunedTable:
    """The table in a file, which need not be there yet."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            ValueError: the file holds something else, or what another GPU measured.
        """
        self.file = file
        self._known = tuned.read(file)
        self._here = environment()
        self._environments: list[Json] = []
        self._rows: list[dict[str, Json]] = []
        self._added = False
        if not file.exists():
            return
        content = json.loads(file.read_text(encoding="utf-8"))
        self._rows, self._environments = content["rows"], content.get("environments") or []
        gpus = _gpus(self._environments, self._rows)
        if gpus is None:
            raise ValueError(f"tune: {file} does not say where its rows were measured")
        if others := sorted(map(str, gpus - {self._here["gpu"]})):
            raise ValueError(
                f"tune: {file} is of {', '.join(others)}, and this is {self._here['gpu']}:"
                " name another file by --out"
            )

    def knows(self, function: str, sizes: tuple[int, ...], like: Any) -> bool:
        """Whether launches take what it has; `like` is a configuration of today."""
        key = function, sizes
        return key in self._known and not tuned.missing(self._known[key], like)

    def add(self, row: Mapping[str, Json], config: Any) -> None:
        """Writes the file with this row, in place of one that launches do not take."""
        if not self._added:
            self._environments.append(self._here)
            self._added = True
        key = _key(row)
        self._rows = [one for one in self._rows if _key(one) != key]
        self._rows.append({**row, "environment": len(self._environments) - 1})
        self._known[key] = config
        result: dict[str, Json] = {
            "schema": SCHEMA,
            "kind": "tuned",
            "environments": self._environments,
            "rows": self._rows,
        }
        write_whole(self.file, result, overwrite=True)


def _key(row: Mapping[str, Any]) -> tuned.Key:
    return row["function"], tuple(row["sizes"])


def _gpus(environments: list[Any], rows: list[dict[str, Any]]) -> set[Any] | None:
    """Those of all environments; None if a row is of none of them."""
    try:
        found = {one["gpu"] for one in environments}
        return found if all(environments[row["environment"]] for row in rows) else None
    except (LookupError, TypeError):
        return None
