"""Hears of all that one call does in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch import checks, launch


class Listener(TorchDispatchMode):
    """Listens to a call, to do it again.

    Values of a call have places: None, the call's arguments, then what it makes, in order.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # what keeps torch.compile out of a mode imports it, which takes a second
        return False

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # nothing in here dies, so that no other tensor gets its id
        self._values: list[Any] = [None]
        self._places: dict[int, int] = {id(None): 0}
        self._arguments = 1 + len(arguments)
        self._is_repeatable = True
        for argument in arguments:
            # twice the same tensor does not tell which of two is meant
            if isinstance(argument, Tensor):
                self._is_repeatable &= id(argument) not in self._places
            self._add(argument)

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._places[id(value)] = len(self._values)
        self._values.append(value)

    def listen(
        self,
        role: Literal["watcher", "composer"],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> Any:
        """What `function(*arguments, **named)` returns, heard by this mode, which launches know by
        its role.
        """
        warned = checks.thread.warned
        with self:
            setattr(launch.thread, role, self)
            try:
                result = function(*arguments, **named)
            finally:
                setattr(launch.thread, role, None)
        # each call warns anew
        self._is_repeatable &= checks.thread.warned == warned
        return result
