"""Errors of a GPU after which a process can measure nothing more."""

from __future__ import annotations

# of the driver, after which every later call fails too
_FATAL = (
    "CUDA error",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch failure",
    "device-side assert",
)


# of the same kind, after which a process goes on: memory, and calls that no graph can hold
_HARMLESS = ("out of memory", "captur")


def is_fatal(error: Exception) -> bool:
    """Whether it is the device's, so that this process can measure nothing more."""
    text = str(error)
    return any(fatal in text for fatal in _FATAL) and not any(one in text for one in _HARMLESS)


def reraise(error: Exception) -> None:
    """Raises an error of the device again."""
    if is_fatal(error):
        raise error
