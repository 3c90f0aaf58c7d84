"""Why a shape runs what it runs."""

import pytest
from click.testing import CliRunner

from tritorch import tuned
from tritorch.bench import decisions
from tritorch.cli import main
from tritorch.testing import dry
from tritorch.testing.errors import RequestError

pytestmark = pytest.mark.compile


def test_a_measured_shape_and_one_that_is_not():
    shape = "256,256,14,14,256,3"
    forward, backward = decisions.decisions("conv2d", shape)
    assert forward.kernels == ("conv2d_tma_kernel",)
    [answer] = forward.answers
    table = tuned.read(tuned.shipped(decisions.GPUS["sm_90"]))
    key = answer.function, answer.sizes
    assert answer.measured
    assert answer.config is not None
    assert str(answer.config) == str(table[key])
    assert "conv2d_grad_weight_tma_kernel" in backward.kernels
    # of another batch nothing was measured
    [answer] = decisions.decisions("conv2d", "31,256,14,14,256,3")[0].answers
    assert not answer.measured


def test_a_kernel_that_declines_is_said():
    # few pixels are not for the tensor memory accelerator
    forward, _ = decisions.decisions("conv2d", "1,64,8,8,64,3")
    assert forward.kernels == ("conv2d_kernel",)
    assert [(a.function, a.config is None) for a in forward.answers] == [
        ("conv2d_tma_config", True),
        ("conv2d_config", False),
    ]
    assert any("not this kernel" in line for line in decisions.lines([forward]))


def test_a_launch_says_the_stages_that_it_has():
    """One slice has no use for the four stages of its configuration."""
    forward, _ = decisions.decisions("conv2d", "256,64,56,56,256,1")
    [launch] = forward.launches
    assert forward.answers[0].config.num_stages == 4
    assert launch.num_stages == 2
    *_, line = decisions.lines([forward])
    assert line == (
        "  matmul_tma_kernel on 25088 x 1 x 1: num_warps: 4, num_stages: 2, shared: "
        f"{dry.resources(launch).shared} bytes"
    )


def test_other_gpus_run_the_portable_kernels():
    forward, _ = decisions.decisions("matmul", "512,512,512", "sm_80")
    assert forward.kernels == ("matmul_kernel",)
    assert not forward.answers[0].measured


def test_products_in_tf32_are_said():
    """A factor that does not lie along the inner axis has the portable kernel, as float32 has."""
    command = "inspect", "--why", "linear", "2048,2048,64", "--dtypes", "float32"
    for flags, kernel in ((), "matmul_kernel"), (("--tf32",), "matmul_tma_kernel"):
        result = CliRunner().invoke(main, [*command, *flags])
        assert result.exit_code == 0
        assert f"forward: {kernel}\n" in result.output
        assert "backward: matmul_kernel" in result.output


@pytest.mark.parametrize(
    ("op", "shape"),
    [("relu", "1,2,3"), ("conv2d", "1,2,3"), ("matmul", "a,b,c"), ("matmul", "0,1,2")],
)
def test_what_is_no_shape_is_said(op, shape):
    with pytest.raises(RequestError, match="--why"):
        decisions.decisions(op, shape)
    result = CliRunner().invoke(main, ["inspect", "--why", op, shape])
    assert (result.exit_code, "--why" in result.output) == (2, True)


def test_the_command_prints_them():
    result = CliRunner().invoke(main, ["inspect", "--why", "linear", "64,256,128"])
    assert result.exit_code == 0
    assert "forward: matmul_kernel" in result.output
    assert "the kernel's own choice" in result.output


@pytest.mark.parametrize("asked", [("--why", "linear", "64,256,128"), ("linear", "--rank")])
def test_an_answer_that_is_no_report_is_not_written(tmp_path, asked):
    path = tmp_path / "a.json"
    result = CliRunner().invoke(main, ["inspect", *asked, "--json", str(path)])
    option = "--why" if "--why" in asked else "--rank"
    assert f"--json holds the report of a TARGET, not {option}" in result.output
    assert (result.exit_code, path.exists()) == (2, False)


def test_a_difference_of_reports_is_not_written(tmp_path):
    reports = [tmp_path / "a.json", tmp_path / "b.json"]
    for report in reports:
        report.write_text("{}")
    path = tmp_path / "c.json"
    words = ["inspect", "--diff", *map(str, reports), "--json", str(path)]
    result = CliRunner().invoke(main, words)
    assert "not --diff of two reports" in result.output
    assert (result.exit_code, path.exists()) == (2, False)
