"""Runs pytest in forks of a process that has imported what all tests import, and none of tritorch.

It reads requests from standard input, one JSON object a line: `arguments` of pytest, the file
`output` for what it prints.  It answers with the exit status, or the negative number of a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy  # noqa: F401
import pytest
import torch._dynamo
import triton.language  # noqa: F401

# seconds after which a run of tests hangs
PATIENCE = 1800


def run(arguments: list[str], output: str) -> int:
    """Exit status of pytest in this process, which ends for it."""
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)
    # the tests' folder, not this file's
    sys.path[0] = os.getcwd()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        return int(pytest.main(arguments))
    finally:
        sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = run(**request)
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
