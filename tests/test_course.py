"""A newcomer's first programs: each file of course/ gives the same with tritorch as with torch."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tritorch import launch

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

FILES = sorted((Path(__file__).parent / "course").glob("*.py"))
NUMBER = re.compile(r"-?\d+\.\d+")


class Run:
    """What one program leaves behind.

    As in a notebook, its last expression is its value, and a class at its end is one to try: if
    that is a module and the program defines `inputs`, the module is called with them.
    """

    def __init__(self, source, device):
        tree = ast.parse(source)
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body[-1] = ast.Assign([ast.Name("value", ast.Store())], last.value)
        elif isinstance(last, ast.ClassDef):
            tree.body += ast.parse(f"value = {last.name}()").body
        names, printed = {"__name__": "course"}, io.StringIO()
        torch.manual_seed(0)
        with torch.device(device), contextlib.redirect_stdout(printed):
            exec(compile(ast.fix_missing_locations(tree), "course", "exec"), names)
            if isinstance(names.get("value"), torch.nn.Module) and "inputs" in names:
                self.call(names["value"], names)
        self.printed = printed.getvalue()
        self.computes = "inputs" in names
        self.tensors, self.modules = {}, {}
        for name, value in names.items():
            if isinstance(value, torch.Tensor):
                self.tensors[name] = value
                self.tensors[f"{name}.grad"] = value.grad if value.is_leaf else None
            elif isinstance(value, torch.nn.Module):
                self.modules[name] = repr(value)
                self.tensors |= {f"{name}.{key}": t for key, t in value.state_dict().items()}
                self.tensors |= {
                    f"{name}.{key}.grad": p.grad for key, p in value.named_parameters()
                }

    def call(self, module, names):
        input, *target = names["inputs"]
        names["input"] = input.requires_grad_()
        names["output"] = module(input, *target)
        names["output"].square().sum().backward()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_program_gives_what_it_gives_with_torch(file, device, rung):
    source = file.read_text()
    expected = Run(source.replace("tritorch", "torch"), device)
    with launch.recorded() as launches:
        actual = Run(source, device)
    assert_close(actual.tensors, expected.tensors)
    assert actual.modules == expected.modules
    # every number to the last printed digit, every other character exactly
    assert NUMBER.sub("#", actual.printed) == NUMBER.sub("#", expected.printed)
    numbers = [[float(n) for n in NUMBER.findall(run.printed)] for run in (actual, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=1.01e-4)
    assert bool(launches) == (actual.computes and rung != "reference")


def test_course_shows_every_concept():
    assert [int(file.stem.split("_")[0]) for file in FILES] == list(range(1, len(FILES) + 1))
    assert len(FILES) == 20
    assert all(file.read_text().startswith("# ") for file in FILES)
    assert not any(re.search(r"(import|from) torch", file.read_text()) for file in FILES)
