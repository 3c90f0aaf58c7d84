"""An examination whose own mistakes are told from what it finds."""

from __future__ import annotations

from tritorch.testing import examine
from tritorch.testing.errors import InternalError
from tritorch.testing.findings import Finding


class Examination(examine.Examination):
    """`examine.Examination` that goes on where the checks themselves raise, and keeps what."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._mistakes: list[InternalError] = []

    def watched(self, step: examine.Step) -> list[Finding]:
        try:
            return super().watched(step)
        except InternalError as error:
            self._mistakes.append(error)
            return []

    def mistakes(self) -> list[InternalError]:
        """What the checks themselves raised since it was last asked."""
        found, self._mistakes = self._mistakes, []
        return found
