"""The course of docs/course: its chapters, and what their programs print, written by running them.

`python -m tests.chapters` rewrites the outputs, the last line of each chapter and the index;
`--check` only says whether one is stale.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "docs" / "course"
INDEX = COURSE / "README.md"
# the first one's outputs are those of both
LANGUAGES = {"en": "English", "zh": "中文"}
_CONTENTS = {"en": "Contents", "zh": "目录"}
_NEXT = {"en": "Next: ", "zh": "下一章 "}

_FENCE = re.compile(r"^```(?P<language>[a-z ]+)\n(?P<body>.*?)^```\n", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"(<!-- course: chapters -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Program:
    """One block of a chapter, and what is said of its output: None where no block says it."""

    code: str
    printed: str | None = None
    interpreted: str | None = None


@dataclass
class Chapter:
    """A page of either language."""

    path: Path
    text: str
    programs: list[Program] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Chapter:
        return cls.parse(path, path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, path: Path, text: str) -> Chapter:
        programs: list[Program] = []
        end = 0
        for match in _FENCE.finditer(text):
            language, body = match["language"], match["body"]
            if language == "python":
                programs.append(Program(body))
            elif language == "text" and programs and not text[end : match.start()].strip():
                programs[-1].printed = body
            elif language == "text interpret" and programs:
                programs[-1].interpreted = body
            elif language.startswith("text"):
                raise ValueError(f"{path.name}: an output that follows no program: {body}")
            end = match.end()
        return cls(path, text, programs)

    @property
    def language(self) -> str:
        return self.path.parent.name

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0].removeprefix("# ")

    @property
    def has_kernels(self) -> bool:
        """Whether it says what Triton's interpreter makes of a program."""
        return any(program.interpreted is not None for program in self.programs)

    def translation(self, language: str) -> Path:
        return self.path.parent.parent / language / self.path.name


def paths(language: str) -> list[Path]:
    """The chapters of a language in their order."""
    return sorted((COURSE / language).glob("*.md"))


def outputs(codes: list[str], name: str = "course") -> list[str]:
    """What each program prints, one after another in the same namespace."""
    names: dict[str, Any] = {"__name__": name}
    found = []
    # a chapter that forgets to choose its seed prints something else each time
    torch.seed()
    threads = torch.get_num_threads()
    # sums in one order, however many cores there are
    torch.set_num_threads(1)
    try:
        for number, code in enumerate(codes, 1):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{name}, program {number}", "exec"), names)
            found.append(printed.getvalue())
    finally:
        torch.set_num_threads(threads)
    return found


def interpreted(codes: list[str]) -> list[str]:
    """`outputs` where CPU tensors take the kernels, which a process decides when it starts."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.chapters", "--run"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[str] = json.loads(done.stdout)
    return found


def same_programs(one: Chapter, other: Chapter) -> bool:
    """Whether two chapters differ in comments and in the layout of their code alone."""

    def trees(chapter: Chapter) -> list[str]:
        return [ast.dump(ast.parse(program.code)) for program in chapter.programs]

    return trees(one) == trees(other)


def footer(chapter: Chapter) -> str:
    """The last line: to the index, to the other language, to the next chapter."""
    (other,) = (language for language in LANGUAGES if language != chapter.language)
    links = [
        f"[{_CONTENTS[chapter.language]}](../README.md)",
        f"[{LANGUAGES[other]}](../{other}/{chapter.path.name})",
    ]
    rest = [path for path in paths(chapter.language) if path.name > chapter.path.name]
    if rest:
        links.append(f"{_NEXT[chapter.language]}[{Chapter.of(rest[0]).title}]({rest[0].name})")
    return " | ".join(links) + "\n"


def regenerated(chapter: Chapter, printed: list[str], interpreted: list[str] | None) -> str:
    """The chapter's text with these outputs, and with the last line of its place."""
    number, after_program = -1, False

    def block(match: re.Match[str]) -> str:
        nonlocal number, after_program
        if match["language"] == "python":
            number += 1
            shown = f"\n```text\n{printed[number]}```\n" if printed[number] else ""
            return match[0] + shown
        if match["language"] == "text interpret" and interpreted is not None:
            return f"```text interpret\n{interpreted[number]}```\n"
        return match[0]

    # an output stands right below its program: taken out, it is written anew
    bare = re.sub(
        r"(^```python\n.*?^```\n)\n```text\n.*?^```\n",
        r"\1",
        chapter.text,
        flags=re.DOTALL | re.MULTILINE,
    )
    body, last = _FENCE.sub(block, bare).rstrip("\n").rsplit("\n", 1)
    contents = f"[{_CONTENTS[chapter.language]}]"
    if not last.startswith(contents):
        body, last = f"{body}\n{last}\n", ""
    return f"{body}\n{footer(chapter)}"


def index_table() -> str:
    """One row per chapter, in both languages."""
    rows = [" | ".join(["", *LANGUAGES.values(), ""]).strip(), "| -- | -- |"]
    for path in paths("en"):
        cells = [
            f"[{Chapter.of(path.parent.parent / language / path.name).title}]"
            f"({language}/{path.name})"
            for language in LANGUAGES
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def regenerated_index(text: str) -> str:
    return _TABLE.sub(lambda match: match[1] + index_table() + match[2], text)


@functools.cache
def documents() -> dict[Path, str]:
    """Every page of the course as it should be."""
    pages = {INDEX: regenerated_index(INDEX.read_text(encoding="utf-8"))}
    for path in paths("en"):
        chapter = Chapter.of(path)
        codes = [program.code for program in chapter.programs]
        printed = outputs(codes, path.stem)
        by_kernels = interpreted(codes) if chapter.has_kernels else None
        for language in LANGUAGES:
            page = Chapter.of(chapter.translation(language))
            if not same_programs(chapter, page):
                raise ValueError(f"{language}/{path.name}: programs differ from en/{path.name}")
            pages[page.path] = regenerated(page, printed, by_kernels)
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if one is stale"
    )
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        json.dump(outputs(json.load(sys.stdin)), sys.stdout)
        return
    stale = []
    for path, text in documents().items():
        if path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python -m tests.chapters")


if __name__ == "__main__":
    main()
