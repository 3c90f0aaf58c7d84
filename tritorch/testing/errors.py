"""Whose fault an exception is: of the request, of the code under check, or of the checks."""

from __future__ import annotations

import dis
import traceback
from types import FrameType, TracebackType

from tritorch.testing import redirect


class RequestError(ValueError):
    """What is asked for is not there, cannot be read, or does not fit: says what and why."""


class InternalError(RuntimeError):
    """The checks raised, not what they check: the message is the whole traceback."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("".join(traceback.format_exception(error)).rstrip())
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # equal for what one mistake causes again
        self.key = type(error).__name__, frame.filename, frame.lineno


def must_be_the_users(error: BaseException) -> None:
    """Raises InternalError from `error` where that is a mistake of the checks themselves."""
    if isinstance(error, InternalError):
        raise error
    if is_internal(error):
        raise InternalError(error) from error


def is_internal(error: BaseException) -> bool:
    """Whether the checks' own code raised by mistake, and nothing that it calls for a user.

    What it raises on purpose below a user's code, or by an exception of its own, is said to the
    user.
    """
    if isinstance(error, MemoryError | RecursionError) or not isinstance(error, Exception):
        return False
    cause: BaseException = error
    own = _is_labs(type(error).__module__)
    while cause.__cause__ is not None:
        cause = cause.__cause__
        own = own or _is_labs(type(cause).__module__)
    if own:
        return False
    frames = _frames(cause.__traceback__)
    # numpy and the standard library do as they are told
    while frames and redirect.is_tool(_module(frames[-1][0])):
        frames.pop()
    if not frames:
        return False
    by_user = any(_is_users(frame) for frame, _ in frames)
    frame, instruction = frames[-1]
    if _is_labs(_module(frame)):
        # an assertion without a message says nothing to a user
        said = by_user and bool(cause.args) and _raises(frame, instruction)
        return not said and not _hands_on(frame)
    # torch or Triton, called by no code but the checks'
    return not by_user and not any(_hands_on(frame) for frame, _ in frames)


def _frames(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    """Each frame, the innermost last, with the instruction that it is at."""
    found = []
    while trace is not None:
        found.append((trace.tb_frame, trace.tb_lasti))
        trace = trace.tb_next
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _is_labs(module: str) -> bool:
    # makes samples, of a shape that it is told
    return module.startswith("tritorch.testing") or module == "tritorch.registry"


def _is_users(frame: FrameType) -> bool:
    module = _module(frame)
    # tritorch's own ops are checked like a user's
    ours = module.startswith("tritorch.") and not _is_labs(module)
    return ours or redirect.is_users(module)


# what calls a function under check, or stands in for one that it calls
_BETWEEN = frozenset(
    f"tritorch.testing.{name}"
    for name in ("absent_gpu", "calls", "hosting", "libdevice", "redirect")
)


def _hands_on(frame: FrameType) -> bool:
    """Whether what the frame raises is of the function that it calls, or of what that returned."""
    # whose engine runs a user's backward, and says what is wrong with its gradients
    passes = _module(frame).startswith("torch.autograd")
    mode = frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__")
    return passes or mode or _module(frame) in _BETWEEN


def _raises(frame: FrameType, instruction: int) -> bool:
    """Whether the frame is at a statement `raise`."""
    return dis.opname[frame.f_code.co_code[instruction]] == "RAISE_VARARGS"
