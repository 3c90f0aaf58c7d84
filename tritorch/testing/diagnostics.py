"""What compilers write to standard error, which Triton's exceptions do not contain."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

# characters of one diagnostic, and how many a message has
_LONGEST = 200
_MOST = 3
# says no more than that there are others
_SUMMARY = "Failures have been detected while processing an MLIR pass pipeline"

# "kernel.py:7:45: error: text" of MLIR, "LLVM ERROR: text", "ld.lld: error: text", and of ptxas
# "ptxas /tmp/x.ptx, line 39; error   : text"; LLVM's assembler quotes the line that it refuses
_DIAGNOSTIC = re.compile(
    r"^(?:(?P<file>[^\n:]+):(?P<line>\d+)(?::\d+)?: |[^\n:\[]*[:;] )?"
    r"(?:LLVM ERROR|error) *: (?P<text>.+)"
    r"(?:\n\s+(?P<quoted>\S.*?);?\n\s*\^)?",
    re.MULTILINE,
)


def end() -> int:
    """Where standard error ends, if it is a file: what a process of a check has."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def since(position: int) -> str:
    """What has been written to standard error since `end` was there; it stays there.

    By any language.  Empty where it is no file: then it has been seen.
    """
    if position < 0:
        return ""
    # opened anew: the position of the descriptor itself is the writers'
    with Path("/proc/self/fd/2").open("rb") as file:
        file.seek(position)
        return file.read().decode(errors="replace")


def told(text: str, said: str) -> tuple[str, tuple[str, int] | None]:
    """An error's text with what the compiler had to say, and the user's line if that names it.

    text: of the exception.  said: on standard error.
    """
    found = [*_DIAGNOSTIC.finditer(said), *_DIAGNOSTIC.finditer(text)]
    place, texts = None, []
    for match in found:
        known = match["file"] and Path(match["file"]).is_file()
        if known and place is None:
            place = match["file"], int(match["line"])
        quotes = match["quoted"] and not known
        if not match["text"].startswith(_SUMMARY):
            texts.append(match["text"] + (f": {match['quoted']}" if quotes else ""))
    if texts:
        shown = "; ".join(one[:_LONGEST] for one in list(dict.fromkeys(texts))[:_MOST])
        return f"the compiler says: {shown}", place
    if "PassManager::run failed" in text:
        return "Triton's compiler gives up; what it says is on standard error", None
    return text.strip(), None
