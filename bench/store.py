"""A result file that grows row by row, and that a later run goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritorch.bench.environment import SCHEMA, environment, write_whole

# seconds between two writes of a growing file
_EVERY = 2.0
# that a result has in any case
_FIELDS = ("schema", "kind", "environment", "rows", "skipped")
# of an environment: with another one times are not of the same thing
_SAME = (
    "gpu",
    "driver",
    "power_limit_watts",
    "mig",
    "cuda",
    "cudnn",
    "torch",
    "triton",
    "commit",
    "code",
)


class OtherResults(ValueError):
    """The file holds what other code or another machine gave."""


class Store:
    """Rows of one run, and what was skipped and why, in a file that is always whole."""

    def __init__(self, path: Path | None, kind: str = "bench") -> None:
        self.path, self.kind = path, kind
        self.more: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.environment: Mapping[str, Any] | None = None
        self._written = 0.0

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Store:
        """A result that was read, and is not written again."""
        store = cls(None, str(result.get("kind")))
        store.rows, store.environment = result["rows"], result["environment"]
        store.skipped = result.get("skipped", [])
        store.more = {n: v for n, v in result.items() if n not in _FIELDS}
        return store

    def go_on(self, environment: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Takes the environment of a run, or unless it is `fresh` the rows and the environment that
        an earlier one in it left.

        Raises OtherResults where the file is of another environment, and leaves it as it is.
        """
        if self.environment is not None:
            return
        if not fresh and self.path is not None and self.path.exists():
            found = self._read(self.path)
            then = found["environment"]
            for name in _SAME:
                if then.get(name) != environment.get(name):
                    raise OtherResults(
                        f"{self.path} holds results of {name} {then.get(name)}, this is "
                        f"{environment.get(name)}: name another folder"
                    )
            self._take(found)
            environment = then
        self.environment = environment

    def again(self) -> None:
        """Takes what an earlier run left, whatever its environment, and keeps its environment.

        Raises OtherResults where there is no result.
        """
        if self.path is not None and self.path.exists():
            found = self._read(self.path)
            self._take(found)
            self.environment, self.skipped = found["environment"], found.get("skipped", [])

    def _take(self, found: Mapping[str, Any]) -> None:
        self.rows = found["rows"]
        self.more = {n: v for n, v in found.items() if n not in _FIELDS} | self.more

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OtherResults(f"{path} holds no result: {error}") from error
        if found.get("schema") != SCHEMA:
            raise OtherResults(f"{path} has schema {found.get('schema')}, not {SCHEMA}")
        return found

    def capability(self) -> str | None:
        """Of the GPU of this run, "9.0" say."""
        return None if self.environment is None else self.environment.get("capability")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write_now_and_then()

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def change(self, row: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """More of a row that is there."""
        row |= fields
        self._write_now_and_then()

    def skip(self, section: str, what: str, why: str) -> None:
        self.skipped.append({"section": section, "what": what, "why": why})

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "environment": self.environment or environment(),
            "rows": self.rows,
            "skipped": self.skipped,
            **self.more,
        }

    def write(self) -> None:
        """Raises OSError where the disk is full: what was written before is left as it is."""
        # until a run has begun, what lies there may be another one's
        if self.path is not None and (self.environment is not None or not self.path.exists()):
            write_whole(self.path, self.content(), overwrite=True)
        self._written = time.monotonic()
