"""What the documentation says of `tritorch check` is what it does, and no link leads nowhere."""

import re
import shlex

import pytest

from tests.lab import gallery
from tests.lab.gallery import ROOT
from tritorch.cli.check import check
from tritorch.registry import Maker

GUIDE = ROOT / "docs" / "check.md"
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "bench/README.md",
        "docs/check.md",
        "docs/inspect.md",
        "docs/performance.md",
        "docs/predictions.md",
        "examples/README.md",
        "kernels/README.md",
    )
] + sorted((ROOT / "docs" / "course").rglob("*.md"))
REGENERATE = "run python -m tests.lab.gallery"
# what torch's own products measure differs from CPU to CPU
_MEASURED = re.compile(r"\d+\.\d+(e-?\d+)?|\d+e-\d+")


def shown(document):
    return gallery.blocks(document.read_text())


def alike(text):
    return _MEASURED.sub("#", text)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["kinds", "levels", "options"])
def test_tables_are_fresh(name):
    assert shown(GUIDE)[name] == gallery.BLOCKS[name](), REGENERATE


@pytest.mark.interpret
@pytest.mark.parametrize("name", gallery.EXCERPTS)
def test_examples_and_what_is_said_of_them_are_fresh(name):
    section = gallery.section(name)
    assert alike(section) in alike(shown(GUIDE)["gallery"]), REGENERATE
    assert "Its test passes; " in section
    if name == "matmul":
        assert alike(shown(GUIDE)["report"]) == alike(gallery.whole(name)), REGENERATE
    if name == "gather_rows":
        README = ROOT / "README.md"
        assert shown(README) == {"brief": gallery.brief(name)}, REGENERATE


@pytest.mark.reference
def test_every_example_is_in_the_gallery():
    files = sorted(file.stem for file in gallery.EXAMPLES.glob("*.py"))
    assert sorted(gallery.EXCERPTS) == files
    assert sorted(re.findall(r"^### \[(\w+)\.py\]", shown(GUIDE)["gallery"], re.M)) == files


@pytest.mark.reference
def test_every_block_stands_in_a_document():
    names = [name for document in gallery.DOCUMENTS for name in shown(document)]
    assert sorted(names) == sorted(gallery.BLOCKS)


@pytest.mark.reference
def test_a_stale_block_is_seen():
    text = "a\n<!-- lab: kinds -->\n| old |\n<!-- end -->\nb\n"
    fresh = f"a\n<!-- lab: kinds -->\n{gallery.kinds()}<!-- end -->\nb\n"
    assert gallery.regenerated(text) == fresh
    assert gallery.regenerated(fresh) == fresh
    with pytest.raises(KeyError, match="unknown"):
        gallery.regenerated("<!-- lab: unknown -->\n<!-- end -->")


@pytest.mark.reference
def test_an_excerpt_ends_where_it_says():
    source = "a = 1\n  b = 2\n  c = 3\n  b2 = 4\n"
    assert gallery.excerpt(source, "b = 2", "b2") == "b = 2\nc = 3\nb2 = 4"
    with pytest.raises(RuntimeError, match="found it in 0"):
        gallery.excerpt(source, "d = ", "b2")


def commands(text):
    """The arguments of every `tritorch check` of a text, in code or in a line of its own."""
    found = re.findall(r"^(?:\$ )?(?:python -m )?tritorch check (.+)$", text, re.M)
    found += re.findall(r"`tritorch check ([^`\n]+)`", text)
    return [shlex.split(one) for one in found]


def option_names():
    return {name for option in check.params for name in option.opts}


@pytest.mark.reference
@pytest.mark.parametrize("document", gallery.DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document):
    found = commands(document.read_text())
    assert found
    for arguments in found:
        # raises for an unknown option and for a value that it does not take
        check.make_context("check", list(arguments))


@pytest.mark.reference
def test_options_in_the_text_exist():
    text = re.sub(r"<!-- lab: .*?<!-- end -->", "", GUIDE.read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert len(named) > 5
    assert named <= option_names()


@pytest.mark.reference
def test_a_wrong_command_is_seen():
    text = "`tritorch check`\n```\n$ tritorch check a.py:f --no-such 'x[M, K]'\n```\n"
    (arguments,) = commands(text)
    assert arguments == ["a.py:f", "--no-such", "x[M, K]"]
    with pytest.raises(Exception, match="--no-such"):
        check.make_context("check", arguments)


def dead_links(page, text):
    """The relative links of a page that lead to no file, or to no heading of one."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target, text, page)):
            dead.append(link)
    return dead


def anchors(target, text, page):
    """The headings of a page as GitHub names them."""
    content = text if target == page else target.read_text()
    headings = re.findall(r"^#+ (.+)$", content, re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower()).replace(
            " ", "-"
        )
        for heading in headings
    }


@pytest.mark.reference
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert dead_links(page, page.read_text()) == []


@pytest.mark.reference
def test_a_dead_link_is_seen():
    text = "# One heading\n[a](#one-heading) [b](check.md) [c](gone.md) [d](#two) [e](https://x.y)"
    assert dead_links(GUIDE, text) == ["gone.md", "#two"]


def python_blocks():
    """The Python of the guide that is typed by hand: a function of samples, a check, a test."""
    text = re.sub(r"<!-- lab: .*?<!-- end -->", "", GUIDE.read_text(), flags=re.DOTALL)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def output_of(status, *arguments):
    done = gallery.run(*arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.interpret
def test_python_in_the_guide_runs():
    samples, checked, _ = python_blocks()
    assert output_of(0, "-c", checked).startswith("masked lane ")
    names = {}
    exec(samples, names)
    calls = list(names["samples"](Maker()))
    assert [call["x"].shape for call in calls] == [(5, 7), (130,)]


@pytest.mark.interpret
def test_fixture_in_the_guide_fails_with_the_report(tmp_path):
    *_, test = python_blocks()
    file = tmp_path / "test_of_the_guide.py"
    file.write_text(test)
    options = ["-p", "pytest_tritorch", "-p", "no:cacheprovider", "--tritorch-level", "quick"]
    printed = output_of(1, "-m", "pytest", *options, str(file))
    assert re.search(r"^1\. masked lane .*softmax\.py:\d+", printed, re.M)
