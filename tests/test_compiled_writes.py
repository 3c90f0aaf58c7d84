"""Gradients of compiled programs that write tensors in place, which the compiler does not check."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch.testing import assert_close

import tritorch.ops
from tests.layers import CASES, ONE_OF_EACH, cases, make_call, make_layer
from tests.test_transforms import RANDOM
from tritorch import nn

pytestmark = pytest.mark.interpret

IN_PLACE = [case for case in CASES if case.arguments.get("inplace")]


def gradients(run, module, case, device):
    """What `run(layer, input, *others)` sends to the input and to the layer's parameters."""
    layer, call = make_layer(module, case, device), make_call(case, device)
    run(layer, *call).backward()
    return [call[0].grad, *(parameter.grad for parameter in layer.parameters())]


def compiled(run, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend=backend)


def calling(layer, input, *others):
    return layer(input * 2.0, *others).square().sum()


@cases(IN_PLACE)
def test_layers_in_place_have_their_gradient_when_compiled(case, device):
    found = gradients(compiled(calling), nn, case, device)
    assert_close(found, gradients(calling, torch.nn, case, device))


def changing(change):
    """A layer's call, after which its input and its output go through `change`."""

    def run(layer, input, *others):
        input = input * 1.0
        output = layer(input, *others)
        output = output[0] if isinstance(output, tuple) else output
        before = output * 1.0
        changed = [change(output, -2.0)]
        if output is not input:
            changed.append(change(input, 3.0))
        return before.sin().sum() + sum(tensor.sum() for tensor in changed)

    return run


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_what_a_layer_saved_and_the_program_changed_is_as_it_was(case, device):
    """Eager programs raise, and so do torch's layers when they are compiled."""
    found = gradients(compiled(changing(torch.Tensor.mul_)), nn, case, device)
    assert_close(found, gradients(changing(torch.mul), torch.nn, case, device))


def test_a_seed_that_the_program_changes_is_that_of_the_call(device):
    input = torch.ones(100, device=device, requires_grad=True)
    seed = torch.tensor([5], device=device)

    def program(input, seed):
        output = tritorch.ops.dropout(input, 0.5, seed=seed)
        seed.add_(1)
        return output

    output = compiled(program)(input, seed)
    output.sum().backward()
    assert_close(input.grad, output.detach())


def test_inductor_drops_the_copies_where_nothing_writes(device):
    """Its passes over the joint graph, without the rest of it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    graphs = []

    def split(joint, *arguments, **named):
        joint_graph_passes(joint)
        graphs.append(joint)
        return min_cut_rematerialization_partition(joint, *arguments, **named)

    def run(graph, inputs):
        return make_boxed_func(graph.forward)

    def program(input, weight):
        hidden = nn.functional.linear(nn.functional.silu(input), weight)
        return nn.functional.linear(nn.functional.relu(hidden), weight).sum()

    leaves = [torch.randn(4, 4, device=device, requires_grad=True) for _ in range(2)]
    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=split)
    compiled(program, backend)(*leaves).backward()
    (graph,) = graphs
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    found = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    program(*leaves).backward()
    assert_close(found, [leaf.grad for leaf in leaves])
