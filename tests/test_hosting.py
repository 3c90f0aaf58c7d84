"""Host code written for a GPU, run without one: devices, what is looked up, what is loaded."""

from __future__ import annotations

import copy
import sys
import textwrap

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.language.extra import libdevice
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from tritorch.testing import hosting, redirect
from tritorch.testing.hosting import hosted, load, named

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("no_gpu")]

CPU = torch.device("cpu")


def really_on_cpu(tensor):
    # torch's own getter, below what is replaced
    return torch._C.TensorBase.device.__get__(tensor) == CPU


FACTORIES = {
    "name": lambda: torch.empty(3, device="cuda"),
    "index": lambda: torch.zeros(3, device="cuda:1"),
    "number": lambda: torch.ones(3, device=0),
    "device": lambda: torch.randn(3, device=torch.device("cuda")),
    "values": lambda: torch.tensor([1.0], device="cuda"),
    "array": lambda: torch.as_tensor([1.0], device="cuda"),
    "like": lambda: torch.zeros_like(torch.ones(3), device="cuda"),
    "new": lambda: torch.ones(3).new_full((2,), 1.0, device="cuda"),
    "pinned": lambda: torch.empty(3, pin_memory=True),
    "cuda": lambda: torch.ones(3).cuda(),
    "to name": lambda: torch.ones(3).to("cuda", torch.float64),
    "to number": lambda: torch.ones(3).to(0),
    "to keyword": lambda: torch.ones(3).to(device="cuda", non_blocking=True),
    "generator": lambda: torch.rand(3, device="cuda", generator=torch.Generator("cuda")),
    "module": lambda: nn.Linear(2, 2).cuda().weight,
    "module to": lambda: nn.Linear(2, 2, device="cuda").to("cuda:0").weight,
    "deep copy": lambda: copy.deepcopy(torch.ones(3, device="cuda")),
    "of another": lambda: torch.empty(3, device=torch.ones(3).device),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_a_tensor_asked_for_on_cuda_is_in_cpu_memory_and_says_cuda(make):
    with hosted():
        x = make()
        assert (x.is_cuda, x.is_cpu, x.get_device()) == (True, False, 0)
        assert x.device == torch.device("cuda", 0)
        assert x.device.type == "cuda"
    assert (x.is_cuda, x.is_cpu, x.device) == (False, True, CPU)
    assert really_on_cpu(x)


def test_a_default_device_is_redirected():
    with hosted():
        with torch.device("cuda"):
            x = torch.zeros(2)
        torch.set_default_device("cuda")
        try:
            y = torch.ones(2)
        finally:
            torch.set_default_device(None)
    assert really_on_cpu(x)
    assert really_on_cpu(y)


def test_a_meta_tensor_stays_one():
    with hosted():
        x = torch.empty(3, device="meta")
        assert x.is_cuda
        assert torch.empty(3, device=x.device).device.type == "meta"


def test_torch_itself_sees_the_cpu():
    # assert_close, Adam and Module.to would take other ways for a CUDA tensor
    with hosted():
        x = nn.Parameter(torch.ones(3, device="cuda"))
        x.grad = torch.ones(3)
        torch.optim.Adam([x], lr=0.1).step()
        torch.testing.assert_close(x.detach(), torch.full((3,), 0.9))
        assert "device" not in repr(x)


@pytest.mark.parametrize("convert", [lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(CPU)])
def test_a_copy_in_host_memory_does_not_change_with_the_original(convert):
    with hosted():
        x = torch.ones(3, device="cuda")
        copied = convert(x)
        x.zero_()
    assert copied.tolist() == [1, 1, 1]


def test_backward_of_an_autograd_function_is_hosted():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float16)
        def forward(ctx, x):
            seen.append((x.is_cuda, x.dtype))
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, grad):
            seen.append((grad.is_cuda, grad.dtype))
            return grad * torch.full((), 2.0, device="cuda")

    with hosted(), torch.autocast("cuda"):
        assert torch.is_autocast_enabled()
        x = torch.ones(3, device="cuda", requires_grad=True)
        Double.apply(x).sum().backward()
    assert seen == [(True, torch.float16), (True, torch.float16)]
    assert x.grad.tolist() == [2, 2, 2]


def test_an_operator_for_cuda_alone_takes_what_is_hosted():
    @torch.library.custom_op("hosting_test::twice", mutates_args=(), device_types="cuda")
    def twice(x: Tensor) -> Tensor:
        return x * torch.full((), 2.0, device="cuda")

    for _ in range(2):
        with hosted():
            assert twice(torch.ones(2, device="cuda")).tolist() == [2, 2]
        with pytest.raises(NotImplementedError, match="hosting_test::twice"):
            twice(torch.ones(2))


def test_the_gpu_that_is_not_there_answers():
    with hosted():
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (9, 0)
        properties = torch.cuda.get_device_properties("cuda")
        assert properties.multi_processor_count == 132
        assert properties.shared_memory_per_block_optin == 232448
        assert torch.get_device_module("cuda") is torch.cuda
        active = driver.active
        assert active.get_active_torch_device() == torch.ones(1).device
        assert active.get_current_target().arch == 90
        known = active.utils.get_device_properties(active.get_current_device())
        assert (known["multiprocessor_count"], known["max_shared_mem"]) == (132, 232448)
        assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream | torch.Generator)
        with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            end.record(torch.cuda.current_stream())
            torch.cuda.synchronize()
            assert start.elapsed_time(end) > 0
        torch.cuda.manual_seed(1)
        first = torch.rand(3, device="cuda")
        torch.cuda.manual_seed(1)
        assert torch.equal(first, torch.rand(3, device="cuda"))
        # a compiler of Python code would have to trace the interpreter
        assert torch.compile(FACTORIES["name"]) is FACTORIES["name"]


def test_nothing_stays_replaced():
    owners = (torch, torch.cuda, Tensor, Autotuner, InterpretedFunction, InterpreterBuilder)
    owners += (libdevice, triton.testing, torch.amp.autocast_mode.autocast, driver)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), hosted(), hosted():
        raise ZeroDivisionError
    for owner, names in zip(owners, before, strict=True):
        changed = {n for n in vars(owner).keys() | names if vars(owner).get(n) is not names.get(n)}
        assert not changed, owner
    assert not hosting._hosts


def test_with_a_gpu_nothing_is_redirected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.empty, Tensor.cuda, torch.cuda.current_device
    with hosted():
        assert before == (torch.empty, Tensor.cuda, torch.cuda.current_device)
        assert Autotuner.run is hosting._run_tuned
        assert not torch.ones(1).is_cuda


def test_a_part_that_torch_lacks_is_named(monkeypatch):
    monkeypatch.delattr(torch.amp.autocast_mode, "_cast")
    with pytest.raises(AttributeError, match="_cast"), hosted():
        pass
    with pytest.raises(RuntimeError, match="hosted: torch has no missing to replace"):
        redirect.replaced(torch, "missing", None)


SCRIPT = """
import torch
import triton
import triton.language as tl
import {helper}

DEVICE = triton.runtime.driver.active.get_active_torch_device()
SCALE = torch.full((1,), 2.0, device="cuda")
MULTIPROCESSORS = torch.cuda.get_device_properties(DEVICE).multi_processor_count

@triton.jit
def scale_kernel(x_ptr, scale_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) * tl.load(scale_ptr))

def scale_(x):
    assert x.is_cuda and x.device == DEVICE
    scale_kernel[(1,)](x, SCALE, {helper}.BLOCK)
    return x

class Scaler:
    apply = staticmethod(scale_)

assert scale_(torch.ones(16, device=DEVICE))[0] == 2

@triton.testing.perf_report(triton.testing.Benchmark(["n"], [2**40], "p", [], [], "ms", "", {{}}))
def benchmark(n, p):
    raise RuntimeError

benchmark.run(print_data=True)
if __name__ == "__main__":
    raise RuntimeError
"""


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def script(tmp_path, request):
    # modules are remembered, so each test has names of its own
    name = f"script_{abs(hash(request.node.name))}"
    helper = f"helper_{abs(hash(request.node.name))}"
    write(tmp_path, **{name: SCRIPT.format(helper=helper), helper: "BLOCK = 16"})
    yield tmp_path / f"{name}.py"
    for module in (name, helper):
        sys.modules.pop(module, None)


def test_a_script_is_loaded_with_what_it_does_at_import(script):
    function = load(f"{script}:Scaler.apply")
    module = sys.modules[function.__module__]
    assert load(f"{script}:scale_") is function
    assert module.MULTIPROCESSORS == 132
    assert really_on_cpu(module.SCALE)
    with hosted():
        assert function(torch.full((16,), 3.0)).tolist() == [6.0] * 16
    # outside the block nothing says cuda, so the script's own test fails
    with pytest.raises(AssertionError):
        function(torch.ones(16))


def test_a_file_of_a_package_is_loaded_as_its_module(tmp_path):
    write(
        tmp_path,
        hosting_pack____init__="",
        hosting_pack__ops="from .sizes import BLOCK\ndef size(): return BLOCK",
        hosting_pack__sizes="BLOCK = 64",
    )
    (tmp_path / "hosting_pack" / "__init__.py").touch()
    function = load(f"{tmp_path}/hosting_pack/ops.py:size")
    assert function() == 64
    assert load("hosting_pack.ops:size") is function


def test_a_script_of_a_known_name_shadows_nothing(tmp_path):
    write(tmp_path, random="def seed(): return 'mine'")
    assert load(f"{tmp_path}/random.py:seed")() == "mine"
    assert "random" not in sys.modules or sys.modules["random"].__file__ != f"{tmp_path}/random.py"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "tritorch.testing.dry",
            r"expects package.module:function .*received 'tritorch.testing.dr",
        ),
        ("nowhere.at_all:f", r"nowhere.at_all: there is no module 'nowhere' on sys.path"),
        ("tritorch.tesing:f", r"tritorch has no module 'tesing'; did you mean testing\?"),
        ("tritorch.testing.dry:problem", r"dry has no 'problem'; did you mean problems\?"),
        ("tritorch.testing.dry:Target.nme", r"dry:Target has no 'nme'"),
        ("{0}/brokn.py:f", r"no such file in .*; did you mean broken.py\?"),
        ("{0}/gone/x.py:f", r"no folder .*gone"),
        ("{0}/broken.py:f", r"broken.py fails to import: ZeroDivisionError: .*broken.py:2\)"),
        ("{0}/typo.py:f", r"typo.py fails to import: SyntaxError: .*typo.py:1\)"),
        ("{0}/leaves.py:f", r"leaves.py fails to import: SystemExit: 3"),
        ("{0}/needs.py:f", r"needs.py fails to import: ModuleNotFoundError: .*'not_installed'"),
        ("{0}/plain.py:two", r"plain.py has no 'two'; it has one"),
    ],
)
def test_a_target_that_is_wrong_says_which_part(tmp_path, target, message):
    write(
        tmp_path,
        broken="\n1 / 0",
        typo="def f(:",
        leaves="raise SystemExit(3)",
        needs="import not_installed",
        plain="one = 1",
    )
    with pytest.raises(ValueError, match=message):
        load(target.format(tmp_path))


def test_what_lies_beside_a_target_is_that_of_the_file_that_was_named(tmp_path):
    write(
        tmp_path,
        beside_home="def one(): return 1\ndef reference(): return 2\nINPUTS = 'y[N]'",
        beside_named="from beside_home import one\ndef reference(): return 1",
        beside_op="""
            import torch
            @torch.library.custom_op("beside::double", mutates_args={})
            def double(x: torch.Tensor) -> torch.Tensor: return x * 2
            INPUTS = "x[M]"
        """,
    )
    found = named(f"{tmp_path}/beside_named.py:one")
    assert found.beside("reference")() == found.value() == 1
    assert (found.beside("INPUTS"), found.beside("DTYPES", ())) == ("y[N]", ())
    assert named(f"{tmp_path}/beside_op.py:double").beside("INPUTS") == "x[M]"
    # a package has its modules by their names
    write(
        tmp_path,
        beside_package__home="from .reference import reference\ndef one(): return 3",
        beside_package__reference="def reference(): return 3",
    )
    (tmp_path / "beside_package" / "__init__.py").write_text("from .home import one")
    assert named("beside_package:one").beside("reference")() == 3
