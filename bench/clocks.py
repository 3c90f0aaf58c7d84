"""What the GPU's clocks do during a measurement, as `nvidia-smi` reports.

A GPU that is too hot, or short of power, is throttled: times taken meanwhile are marked.  Where
`nvidia-smi` is missing, or says nothing, the state is unknown, and nothing fails.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# bits of the mask; source: NVIDIA, NVML API reference, nvmlClocksEventReasons
_REASONS = {
    0x001: "idle",
    0x002: "clocks set by applications",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "clocks set by the display",
}
# a power cap is how a large product runs on a healthy machine, torch's as well as ours
_SLOWED = 0x008 | 0x020 | 0x040 | 0x080

# newer drivers have another name for the same mask, and refuse a query that has a wrong one
_MASKS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_FIELDS = ("clocks.sm", "temperature.gpu", "power.draw")
_SETTINGS = {
    "driver": "driver_version",
    "power_limit_watts": "power.limit",
    "highest_clock_mhz": "clocks.max.sm",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
    "persistence": "persistence_mode",
}
# seconds that an answer may take
_PATIENCE = 5.0
_EVERY_MS = 200


@dataclass(frozen=True)
class State:
    """At one moment: why the clock is not the highest, its megahertz, degrees Celsius, watts."""

    mask: int | None = None
    mhz: float | None = None
    celsius: float | None = None
    watts: float | None = None

    @property
    def reasons(self) -> list[str]:
        return [name for bit, name in _REASONS.items() if (self.mask or 0) & bit]

    def row(self) -> dict[str, Any]:
        """For JSON; `reasons` is None if unknown."""
        reasons = None if self.mask is None else self.reasons
        return {
            "reasons": reasons,
            "mhz": self.mhz,
            "celsius": self.celsius,
            "watts": self.watts,
        }


def summary(states: Iterable[State]) -> dict[str, Any]:
    """Of the states during one measurement, as fields of its row.

    `throttled`: what slowed the GPU down, [] for nothing, None if unknown.  `power_capped`, which
    is normal under load, is None likewise.  `clock_mhz`: the lowest and the highest.
    """
    masks, clocks, heat = [], [], []
    for state in states:
        masks += [] if state.mask is None else [state.mask]
        clocks += [] if state.mhz is None else [state.mhz]
        heat += [] if state.celsius is None else [state.celsius]
    together = functools.reduce(int.__or__, masks, 0)
    return {
        "throttled": State(together & _SLOWED).reasons if masks else None,
        "power_capped": bool(together & 0x004) if masks else None,
        "clock_mhz": [min(clocks), max(clocks)] if clocks else None,
        "celsius": max(heat) if heat else None,
    }


class Watch(Protocol):
    """Sees states; `latest` is the last one seen, if any."""

    latest: State | None

    def seen(self) -> list[State]:
        """The states since the last call."""


class Blind:
    """Where there is nothing to see."""

    latest: State | None = None

    def seen(self) -> list[State]:
        return []


class Smi:
    """Reads what a `nvidia-smi` in the background says every fifth of a second.

    It costs the measuring process one read for each row, and ends when that process does, since its
    pipe is closed then.
    """

    def __init__(self, mask: str, uuid: str) -> None:
        self._uuid, self._rest = uuid, ""
        self.latest: State | None = None
        self._process = subprocess.Popen(
            [*_command(("uuid", mask, *_FIELDS)), f"--loop-ms={_EVERY_MS}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        pipe: Any = self._process.stdout
        self._pipe = pipe.fileno()
        os.set_blocking(self._pipe, False)
        weakref.finalize(self, _end, self._process)

    def seen(self) -> list[State]:
        text = self._rest
        with contextlib.suppress(OSError):
            while chunk := os.read(self._pipe, 1 << 16):
                text += chunk.decode(errors="replace")
        whole, _, self._rest = text.rpartition("\n")
        found = [state for line in whole.splitlines() if (state := _state(line, self._uuid))]
        if found:
            self.latest = found[-1]
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def watch(device: torch.device) -> Watch:
    """What can be seen of a device."""
    if device.type != "cuda":
        return Blind()
    uuid = _uuid(device)
    for mask in _MASKS:
        lines = [line for line in _ask(("uuid", mask, *_FIELDS)) if _state(line, "")]
        # of one GPU there is one line, whatever torch and nvidia-smi call it
        name = uuid if uuid and any(uuid in line for line in lines) else ""
        if name or len(lines) == 1:
            with contextlib.suppress(OSError):
                return Smi(mask, name)
    return Blind()


def settings(device: torch.device | None = None) -> dict[str, Any]:
    """What the machine's owner has set; None for what is unknown."""
    found: dict[str, Any] = dict.fromkeys(_SETTINGS)
    if torch.cuda.is_available():
        found |= _settings(_uuid(device))
    return found


@functools.cache
def _settings(uuid: str) -> dict[str, Any]:
    lines = _ask(("uuid", *_SETTINGS.values()))
    own = [line for line in lines if uuid and uuid in line] or (lines if len(lines) == 1 else [])
    if not own:
        return {}
    values = [_known(cell) for cell in own[0].split(", ")[1:]]
    found: dict[str, Any] = dict(zip(_SETTINGS, values, strict=False))
    for name in ("power_limit_watts", "highest_clock_mhz"):
        found[name] = _number(found.get(name))
    return found


def _uuid(device: torch.device | None) -> str:
    properties = torch.cuda.get_device_properties(device or torch.cuda.current_device())
    # older versions of torch do not tell
    return str(getattr(properties, "uuid", ""))


def _command(fields: Sequence[str]) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _ask(fields: Sequence[str]) -> list[str]:
    """The lines of an answer, one for each GPU; none where there is no answer."""
    try:
        done = subprocess.run(
            _command(fields),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def _state(line: str, uuid: str) -> State | None:
    """None where the line is of another GPU, or no answer at all."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 2 + len(_FIELDS) or uuid not in cells[0]:
        return None
    try:
        mask = int(cells[1], 16)
    except ValueError:
        mask = None
    return State(mask, *(_number(cell) for cell in cells[2:]))


def _known(cell: str) -> str | None:
    cell = cell.strip()
    return None if cell.startswith("[") or not cell else cell


def _number(cell: str | None) -> float | None:
    try:
        return float(cell or "")
    except ValueError:
        return None
