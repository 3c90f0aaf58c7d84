"""Runs a part of a check in a process of its own, which a user's kernel may hang or kill.

The child says what it is about to do before it does it, one JSON object a line, so that whatever
ends it has a name: a signal, or a case that took too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tritorch.testing import diagnostics
from tritorch.testing.errors import RequestError
from tritorch.testing.findings import Finding

# what a child says: a dict with a key "event"
Event = dict[str, Any]

# set in a child, which must not have children of this kind in its turn
CHILD = "TRITORCH_CHECK_CHILD"

# a frame of `faulthandler`'s, most recent first
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+)', re.MULTILINE)
# of a child that has been told to say where it is
_PATIENCE = 5.0
# seconds until a child has imported torch, Triton and what it is to check, on a busy machine
_START = 120.0
# how often a child's silence is interrupted to see whether it is still wanted
_GLANCE = 0.2


def run(
    part: str,
    request: dict[str, Any],
    *,
    timeout: float,
    on_event: Callable[[Event], None],
    unwanted: threading.Event | None = None,
) -> list[Finding]:
    """Runs `part` ("interpret", "compile", "cuda") of a request; findings of how it ended.

    `timeout`: seconds that one case may take.  `on_event` gets every event of the child.
    `unwanted`: once it is set, the child is ended and nothing said.  The child finds modules where
    this process does.  Its own output is kept from the terminal, and shown where it fails.

    Raises RequestError for what the request names and is not there, ChildError where the child
    failed for a reason of its own.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if part == "interpret" else "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        CHILD: "1",
    }
    with tempfile.TemporaryDirectory(prefix="tritorch-check-") as folder:
        trace = Path(folder, "trace")
        said = Path(folder, "said")
        command = [sys.executable, "-m", "tritorch.testing.worker", part, str(trace)]
        read, write = os.pipe()
        with (
            said.open("wb") as output,
            subprocess.Popen(
                [*command, str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                env=environment,
                start_new_session=True,
            ) as child,
        ):
            os.close(write)
            try:
                return _listen(child, read, request, timeout, on_event, unwanted, trace, said)
            finally:
                _end(child)


class ChildError(RuntimeError):
    """The process of a part failed beside its cases: its message is the child's."""


def _listen(
    child: subprocess.Popen[bytes],
    read: int,
    request: dict[str, Any],
    timeout: float,
    on_event: Callable[[Event], None],
    unwanted: threading.Event | None,
    trace: Path,
    said: Path,
) -> list[Finding]:
    assert child.stdin is not None
    events: Queue[str | None] = Queue()
    threading.Thread(target=_pump, args=(read, events), daemon=True).start()
    try:
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
    except BrokenPipeError:
        # it died at once: its exit status and output tell
        pass
    doing: Event = {}
    limit = max(timeout, _START)
    until = time.monotonic() + limit
    while True:
        if unwanted is not None and unwanted.is_set():
            return []
        try:
            line = events.get(timeout=_GLANCE)
        except Empty:
            if time.monotonic() < until:
                continue
            return [_hung(child, doing, limit, trace)]
        if line is None:
            break
        event: Event = json.loads(line)
        if event["event"] == "doing":
            doing = event
        elif event["event"] == "failed":
            raise RequestError(event["message"])
        elif event["event"] == "broken":
            raise ChildError(event["message"])
        on_event(event)
        if event["event"] == "done":
            return []
        # imports and the reference's first calls are no case
        limit = timeout if "id" in doing else max(timeout, _START)
        until = time.monotonic() + limit
    try:
        status = child.wait(timeout)
    except subprocess.TimeoutExpired:
        return [_hung(child, doing, timeout, trace)]
    if status < 0:
        return [_crashed(status, doing, trace, said)]
    text = said.read_text(encoding="utf-8", errors="replace").strip()
    if doing:
        # sys.exit or os._exit in the user's code
        message = f"the process ended itself with exit status {status} in {_shown(doing)}"
        return [Finding("crash", message, case=doing.get("case", ""))]
    raise ChildError(text[-4000:] or f"a process of the check ended with exit status {status}")


def _pump(read: int, events: Queue[str | None]) -> None:
    # closed here: elsewhere it would wait for the line that is being read
    with open(read, encoding="utf-8") as pipe:
        for line in pipe:
            events.put(line)
    events.put(None)


def _crashed(status: int, doing: Event, trace: Path, said: Path) -> Finding:
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    file, line = _where(trace, doing)
    message = f"the process died of {name} in {_shown(doing)}"
    # a compiler that gives up says why there alone
    why, _ = diagnostics.told("", said.read_text(encoding="utf-8", errors="replace"))
    if why:
        message += f": {why}"
    return Finding("crash", message, file=file, line=line, case=doing.get("case", ""))


def _hung(child: subprocess.Popen[bytes], doing: Event, timeout: float, trace: Path) -> Finding:
    """Asks the child where it is, then ends it."""
    child.send_signal(signal.SIGUSR1)
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and not (trace.exists() and trace.stat().st_size):
        time.sleep(0.05)
    file, line = _where(trace, doing)
    message = f"{_shown(doing)} did not end in {timeout:g} s"
    return Finding("hang", message, file=file, line=line, case=doing.get("case", ""))


def _shown(doing: Event) -> str:
    return f"{doing['property']} of {doing['case']}" if "case" in doing else "the start"


def _where(trace: Path, doing: Event) -> tuple[str, int]:
    """The innermost line of the user's own in what `faulthandler` wrote; packages are others'."""
    folder = doing.get("folder", "")
    if not folder or not trace.exists():
        return "", 0
    for frame in _FRAME.finditer(trace.read_text(encoding="utf-8", errors="replace")):
        if frame["file"].startswith(f"{folder}/") and "/site-packages/" not in frame["file"]:
            return frame["file"], int(frame["line"])
    return "", 0


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and whatever it started, which is of its group even after its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
