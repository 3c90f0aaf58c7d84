"""The course: its programs run and print what is shown, in both languages, and with torch alone."""

import re

import pytest

from tests import chapters
from tests.chapters import LANGUAGES, Chapter

ENGLISH = [Chapter.of(path) for path in chapters.paths("en")]
# these import nothing that torch does not have as well
OF_TORCH = [chapter for chapter in ENGLISH if chapter.path.name < "12"]
WITH_KERNELS = [chapter for chapter in ENGLISH if chapter.has_kernels]
REGENERATE = "run python -m tests.chapters"


def by_name(chapter):
    return chapter.path.stem


def codes(chapter):
    return [program.code for program in chapter.programs]


def shown(chapter):
    return [program.printed or "" for program in chapter.programs]


@pytest.mark.reference
@pytest.mark.parametrize("chapter", ENGLISH, ids=by_name)
def test_programs_print_what_is_shown(chapter):
    assert chapters.outputs(codes(chapter), by_name(chapter)) == shown(chapter), REGENERATE


@pytest.mark.reference
@pytest.mark.parametrize("chapter", OF_TORCH, ids=by_name)
def test_torch_prints_the_same(chapter):
    of_torch = [
        re.sub("^import tritorch as torch$", "import torch", code, flags=re.M).replace(
            "from tritorch", "from torch"
        )
        for code in codes(chapter)
    ]
    assert of_torch != codes(chapter)
    assert chapters.outputs(of_torch, by_name(chapter)) == shown(chapter)


@pytest.mark.interpret
@pytest.mark.parametrize("chapter", WITH_KERNELS, ids=by_name)
def test_programs_print_the_same_with_kernels_except_where_it_is_shown(chapter):
    expected = [
        (program.printed or "") if program.interpreted is None else program.interpreted
        for program in chapter.programs
    ]
    assert chapters.interpreted(codes(chapter)) == expected, REGENERATE
    assert any("_kernel" in text for text in expected)


@pytest.mark.reference
def test_every_chapter_is_there_in_every_language():
    names = [chapter.path.name for chapter in ENGLISH]
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))
    assert len(WITH_KERNELS) == 2
    for language in LANGUAGES:
        assert [path.name for path in chapters.paths(language)] == names
        for number, path in enumerate(chapters.paths(language), 1):
            assert Chapter.of(path).title.startswith(f"{number}. ")


@pytest.mark.reference
@pytest.mark.parametrize("chapter", ENGLISH, ids=by_name)
def test_languages_show_the_same(chapter):
    for language in LANGUAGES:
        page = Chapter.of(chapter.translation(language))
        assert chapters.same_programs(chapter, page)
        assert shown(page) == shown(chapter)
        interpreted = [[one.interpreted for one in each.programs] for each in (chapter, page)]
        assert interpreted[0] == interpreted[1]
        assert outline(page) == outline(chapter)


def outline(chapter):
    """Headings, items and rows of the prose, in order."""
    prose = re.sub(r"^```.*?^```$", "", chapter.text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^(#+ |- |\d\. |\|)", prose, re.M)


@pytest.mark.reference
def test_index_and_last_lines_are_fresh():
    text = chapters.INDEX.read_text(encoding="utf-8")
    assert chapters.regenerated_index(text) == text, REGENERATE
    for language in LANGUAGES:
        for path in chapters.paths(language):
            chapter = Chapter.of(path)
            assert chapter.text.endswith(f"\n\n{chapters.footer(chapter)}"), REGENERATE


PAGE = """# 1. Title

```python
print(1)
```

```text
old
```

```python
x = 2
```

```python
print(x)
```

By kernels:

```text interpret
old
```

Last words.
"""


@pytest.mark.reference
def test_a_stale_output_is_seen():
    path = chapters.paths("en")[-1]
    page = Chapter.parse(path, PAGE)
    assert [program.printed for program in page.programs] == ["old\n", None, None]
    assert [program.interpreted for program in page.programs] == [None, None, "old\n"]
    printed = chapters.outputs(codes(page))
    assert printed == ["1\n", "", "2\n"]
    text = chapters.regenerated(page, printed, ["1\n", "", "3\n"])
    fresh = Chapter.parse(path, text)
    assert codes(fresh) == codes(page)
    assert shown(fresh) == printed
    assert [program.interpreted for program in fresh.programs] == [None, None, "3\n"]
    assert "old" not in text
    assert text.endswith(f"\n\nLast words.\n\n{chapters.footer(page)}")
    # written once, it stays
    assert chapters.regenerated(fresh, printed, ["1\n", "", "3\n"]) == text
    # an output that went away
    assert "```text\n" not in chapters.regenerated(fresh, ["", "", ""], None)


@pytest.mark.reference
def test_another_program_and_an_output_of_none_are_seen():
    path = chapters.paths("en")[0]
    page = Chapter.parse(path, PAGE)
    assert chapters.same_programs(page, Chapter.parse(path, PAGE.replace("x = 2", "x = 2  # y")))
    assert not chapters.same_programs(page, Chapter.parse(path, PAGE.replace("x = 2", "x = 3")))
    with pytest.raises(ValueError, match="follows no program"):
        Chapter.parse(path, PAGE.replace("```text\n", "words\n\n```text\n"))


@pytest.mark.reference
def test_a_forgotten_seed_is_seen():
    drawn = ["import torch\nprint(torch.rand(1).item())"]
    assert chapters.outputs(drawn) != chapters.outputs(drawn)
