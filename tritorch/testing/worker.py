"""The process that a part of a check runs in: `python -m tritorch.testing.worker PART TRACE FD`.

Reads a request as JSON from stdin and writes events, one JSON object a line, to the file descriptor
FD.  When it dies, or receives SIGUSR1, it writes its traceback to the file TRACE.  It ends when the
reader of the events does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    part, trace, descriptor = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # stays open: what writes to it may be a signal handler
    where = open(trace, "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable(where, all_threads=False)
    faulthandler.register(signal.SIGUSR1, where, all_threads=False)
    # the descriptor is of this process alone: what a user's code starts must not keep it open
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_reader, args=(descriptor,), daemon=True).start()
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as events:

        def say(event: str, **fields: Any) -> None:
            print(json.dumps({"event": event, **fields}), file=events, flush=True)

        _run(part, json.load(sys.stdin), say)


def _end_with_reader(descriptor: int) -> None:
    """A case that never ends would outlive a parent that was killed."""
    reader = select.poll()
    # no event is asked for: what comes unasked is the end of the pipe
    reader.register(descriptor, 0)
    reader.poll()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def _run(part: str, request: dict[str, Any], say: Any) -> None:
    # Triton reads its mode when it is imported, and tritorch imports it
    from tritorch.testing import errors, parts

    try:
        parts.run(part, request, say)
    except errors.RequestError as error:
        say("failed", message=str(error))
    except Exception:
        say("broken", message=traceback.format_exc())
    else:
        say("done")


if __name__ == "__main__":
    main()
