"""Tables of measured configurations: read, written, asked before a kernel's own choice."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from tritorch import backend, launch, ops, tuned
from tritorch.ops import matmul_function
from tritorch.ops.strided import Layout
from tritorch.testing import dry

pytestmark = pytest.mark.compile

SIZES = (64, 64, 64, 1, 4, False)


def config(block):
    triton = pytest.importorskip("triton")
    return triton.Config({"BLOCK_M": block, "BLOCK_N": 32}, num_warps=2, num_stages=3, maxnreg=128)


def test_a_table_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "table.json"
    rows = [
        tuned.row("matmul_config", SIZES, config(16), median_us=3.5),
        tuned.row("conv2d_config", (1, 2), config(64)),
    ]
    file.write_text(json.dumps({"rows": rows}))
    table = tuned.read(file)
    assert table.keys() == {("matmul_config", SIZES), ("conv2d_config", (1, 2))}
    found = table["matmul_config", SIZES]
    assert str(found) == str(config(16))
    assert tuned.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{"function": "f"}]}', '{"rows": 3}'])
def test_what_is_no_table_is_said(text, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"table.json holds no table"):
        tuned.read(file)
    with pytest.warns(UserWarning, match=r"no row of it is taken"):
        assert tuned._of_user(file) == {}


def test_the_file_is_named_or_that_of_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITORCH_TUNED", raising=False)
    expected = tmp_path / "tritorch" / "tuned" / "nvidia-h100-80gb-hbm3.json"
    assert tuned.path("NVIDIA H100 80GB HBM3") == expected
    monkeypatch.setenv("TRITORCH_TUNED", "here.json")
    assert str(tuned.path("any")) == "here.json"


def seeing(monkeypatch, *names):
    """The process has GPUs of these names, and has touched them."""
    gpus = [
        # one for the screen is older than the kernels
        SimpleNamespace(name=n, major=7 if n == "old" else 9, minor=0, multi_processor_count=132)
        for n in names
    ]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    unread = functools.cache(tuned._of_visible_gpus.__wrapped__)
    monkeypatch.setattr(tuned, "_of_visible_gpus", unread)


def test_rows_of_the_user_win_over_shipped_ones(monkeypatch, tmp_path):
    theirs, ours = tmp_path / "user.json", tmp_path / "installed" / "shipped.json"
    ours.parent.mkdir()
    other = (32, *SIZES[1:])
    theirs.write_text(json.dumps({"rows": [tuned.row("matmul_config", SIZES, config(16))]}))
    rows = [tuned.row("matmul_config", sizes, config(64)) for sizes in (SIZES, other)]
    ours.write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("TRITORCH_TUNED", str(theirs))
    monkeypatch.setattr(tuned, "shipped", lambda gpu: ours)
    seeing(monkeypatch, "a GPU", "old", "a GPU")
    assert str(tuned.find("matmul_config", SIZES, None)) == str(config(16))
    # read once
    theirs.unlink()
    assert str(tuned.find("matmul_config", SIZES, None)) == str(config(16))
    assert str(tuned.find("matmul_config", other, None)) == str(config(64))
    assert tuned.find("conv2d_config", SIZES, None) is None


def test_no_table_is_taken_for_gpus_of_several_kinds(monkeypatch, tmp_path):
    """A plan knows no device, and would give one the other's tile."""
    theirs = tmp_path / "user.json"
    theirs.write_text(json.dumps({"rows": [tuned.row("matmul_config", SIZES, config(16))]}))
    monkeypatch.setenv("TRITORCH_TUNED", str(theirs))
    seeing(monkeypatch, "another GPU", "a GPU")
    with pytest.warns(
        UserWarning, match=r"of several kinds \(a GPU with 132 multiprocessors, another"
    ):
        assert tuned.find("matmul_config", SIZES, None) is None
    # said once
    assert tuned.find("matmul_config", SIZES, None) is None


@pytest.mark.parametrize(
    ("gpu", "capability", "multiprocessors", "expected"),
    [
        ("An A100", "8.0", 108, {"own": 108, "of both": 108}),
        ("NVIDIA H100", "9.0", 132, {"own": 132, "of both": 132}),
        # its own row before that of its like
        ("NVIDIA H200", "9.0", 132, {"own": 132, "of both": 64}),
        # fewer multiprocessors take other tiles
        ("NVIDIA H100 PCIe", "9.0", 114, {}),
        ("NVIDIA B200", "10.0", 132, {}),
        ("none", None, None, {}),
    ],
)
def test_a_gpu_takes_the_table_of_its_like_below_its_own(
    gpu, capability, multiprocessors, expected, monkeypatch, tmp_path
):
    for name, seen, rows in (
        ("nvidia-h100", ("9.0", 132), {"own": 132, "of both": 132}),
        ("nvidia-h200", ("9.0", 132), {"of both": 64}),
        ("an-a100", ("8.0", 108), {"own": 108, "of both": 108}),
    ):
        environment = dict(zip(("capability", "multiprocessors"), seen, strict=True))
        found = [tuned.row(function, SIZES, config(block)) for function, block in rows.items()]
        content = {"environments": [environment], "rows": found}
        if name != "nvidia-h200" or gpu == "NVIDIA H200":
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(tuned, "shipped", lambda gpu: tmp_path / tuned._file_of(gpu))
    monkeypatch.setenv("TRITORCH_TUNED", str(tmp_path / "none of the user's.json"))
    rows = tuned.of(gpu, capability, multiprocessors)
    assert {function: row.kwargs["BLOCK_M"] for (function, _), row in rows.items()} == expected


def test_every_installed_table_says_which_gpus_are_alike():
    for file in tuned.shipped("any").parent.glob("*.json"):
        seen = json.loads(file.read_text())["environments"]
        alike = {(each["capability"], each["multiprocessors"]) for each in seen}
        [(capability, multiprocessors)] = alike
        assert file in tuned.installed("another", capability, multiprocessors)


def test_a_row_of_another_version_is_not_taken():
    """Its kernel would miss a number, in the middle of a training run."""
    triton = pytest.importorskip("triton")
    old, own = triton.Config({"BLOCK_M": 16}), config(64)
    with tuned.using({("matmul_config", SIZES): old}):
        with pytest.warns(UserWarning, match="has no BLOCK_N and is not taken"):
            assert tuned.find("matmul_config", SIZES, own) is None
        # more than the kernel's own has is a choice of it
        assert tuned.find("matmul_config", SIZES, old) is old


def test_a_measured_configuration_is_taken_for_its_sizes_alone():
    a = torch.ones(64, 64)
    table = launch.kernels("matmul").MATMUL_CONFIGS[4]
    with backend.use("triton"), dry.compiling_for("sm_80"):
        with launch.choices() as own, launch.questions() as asked:
            ops.matmul(a, a)
        assert asked == [("matmul_config", SIZES)]
        other = next(each for each in table if each is not own[0][1])
        with tuned.using({("matmul_config", SIZES): other}):
            with launch.choices() as measured:
                ops.matmul(a, a)
            with launch.choices() as unmeasured:
                ops.matmul(a[:32], a)
            with launch.override("matmul_config", own[0][1]), launch.choices() as forced:
                ops.matmul(a, a)
    assert measured == [("matmul_config", other)]
    assert unmeasured[0][1] is not other
    assert forced[0][1] is own[0][1]


def test_plans_that_are_remembered_are_asked_again_for_another_table():
    layout = Layout.of(torch.empty(64, 64))
    arguments = layout, layout, 0, None, None, False, "ieee", None
    own = matmul_function._choose(*arguments)[1].config
    with launch.questions() as asked:
        matmul_function._choose(*arguments)
    [(name, sizes)] = asked
    other = next(each for each in matmul_function.kernels.MATMUL_CONFIGS[4] if each is not own)
    with tuned.using({(name, sizes): other}):
        assert matmul_function._choose(*arguments)[1].config is other
    assert matmul_function._choose(*arguments)[1].config is own
