"""Runs tests and checks in forks of a process that has imported what all need, but no tritorch.

It reads requests from standard input, one JSON object a line: `output`, a file for what is printed,
and either `arguments` of pytest or `check`: a part, an op, a level.  It answers with the exit
status, or the negative number of a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy  # noqa: F401
import pytest
import torch._dynamo
import triton.language  # noqa: F401

# seconds after which a run of tests, or a check, hangs
PATIENCE = 1800


class Found(BaseException):
    """A check has a finding, and need not go on: no error that anyone handles."""


def check(part: str, op: str, level: Any) -> int:
    """What a process of `tritorch check op` does, up to its first finding: then 1, else 0."""
    from tritorch.testing import parts, requests

    def say(event: str, **fields: Any) -> None:
        if event == "finding":
            print(json.dumps(fields["finding"]))
            raise Found

    try:
        parts.run(part, requests.Request(op, level=level).to_json(), say)
    except Found:
        return 1
    return 0


def apart(work: Callable[[], int], output: str) -> int:
    """Exit status of `work` in a fork, or the negative number of a signal."""
    child = os.fork()
    if child != 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        signal.alarm(PATIENCE)
        torch.set_num_threads(1)
        # the tests' folder, not this file's
        sys.path[0] = os.getcwd()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)

        def work(request: dict[str, Any] = request) -> int:
            if "check" in request:
                return check(*request["check"])
            return int(pytest.main(request["arguments"]))

        print(apart(work, request["output"]), flush=True)


if __name__ == "__main__":
    main()
