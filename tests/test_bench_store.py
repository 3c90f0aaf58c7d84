"""A run goes on with what an earlier one left, if it is of the same code on the same machine."""

from __future__ import annotations

import json

import pytest

from tritorch.bench.environment import environment
from tritorch.bench.store import OtherResults, Store

pytestmark = pytest.mark.reference

ROW = {"op": "relu", "median_us": 1.0}


@pytest.fixture
def left(tmp_path):
    """Writes the file of an earlier run, and what it holds."""

    def write(**changed):
        where = {**environment(), "date": "then", **changed}
        content = {"schema": 1, "environment": where, "rows": [ROW], "skipped": [], "a": 1}
        (tmp_path / "gpu.json").write_text(json.dumps(content))
        return Store(tmp_path / "gpu.json"), content

    return write


def test_it_goes_on_and_says_where_it_began(left):
    store, content = left()
    store.go_on(environment())
    # a process that is started again has nothing new to tell
    store.go_on({**environment(), "date": "later"})
    assert (store.rows, store.more) == ([ROW], {"a": 1})
    store.write()
    assert json.loads(store.path.read_text())["environment"] == content["environment"]


@pytest.mark.parametrize(
    "name",
    [
        "gpu",
        "driver",
        "power_limit_watts",
        "mig",
        "cuda",
        "cudnn",
        "torch",
        "triton",
        "commit",
        "code",
    ],
)
def test_what_differs_is_said_and_left_as_it_is(left, name):
    store, content = left(**{name: "another"})
    with pytest.raises(OtherResults, match=f"holds results of {name} another, this is .*: name"):
        store.go_on(environment())
    # however the run ends
    store.write()
    assert json.loads(store.path.read_text()) == content


def test_what_does_not_say_its_code_is_not_gone_on_with(left):
    store, content = left()
    del content["environment"]["code"]
    store.path.write_text(json.dumps(content))
    with pytest.raises(OtherResults, match="holds results of code None, this is"):
        store.go_on(environment())


def test_what_ends_before_it_began_loses_nothing(left):
    store, content = left()
    store.write()
    assert json.loads(store.path.read_text()) == content
    store.go_on({"gpu": "G"}, fresh=True)
    store.write()
    assert json.loads(store.path.read_text())["rows"] == []
