"""What the kernels of pooling, elementwise functions and losses access in less than 128 bits.

`test_compile.py` fails for an access that is not named here, and for a workload that is named and
has become wide.
"""

from collections.abc import Callable
from typing import NamedTuple

_OPS = """
relu relu6 leaky_relu silu gelu sigmoid tanh hardswish hardsigmoid dropout
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
adaptive_max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
mse_loss l1_loss smooth_l1_loss huber_loss nll_loss cross_entropy
binary_cross_entropy binary_cross_entropy_with_logits
"""
OPS = frozenset(_OPS.split())


class Rule(NamedTuple):
    """`allows(wide, narrow)`: whether that many accesses are as the reason says."""

    reason: str
    allows: Callable[[int, int], bool]


_TAPS = Rule(
    "a tap is a byte: those beside 128 bits of values are 64 or 32 bits, one access for each",
    lambda wide, narrow: narrow <= wide,
)
_NUMBERS = Rule(
    "one number for all elements, or of a program: a gradient, a seed, a sum, a weight",
    lambda wide, narrow: narrow <= 2,
)
_MEANS = Rule(
    "a program has one mean of each channel, read from many elements",
    lambda wide, narrow: wide == 0 and narrow == 1,
)
_SPREAD = Rule(
    "a mean is read once for each of its pixels, the next ones out of a cache",
    lambda wide, narrow: wide == 0,
)
_ROWS = Rule(
    "one number of a row of classes: its target, what its softmax needs, its loss",
    lambda wide, narrow: wide > 0,
)
_ROW_RESULTS = Rule(_ROWS.reason, lambda wide, narrow: wide == 0)

# by kernel, loads or stores: whatever the workload
OF_KERNELS = {
    ("max_pool2d_forward_kernel", "stores"): _TAPS,
    ("max_pool3d_forward_kernel", "stores"): _TAPS,
    ("max_pool_rows_forward_kernel", "stores"): _TAPS,
    ("max_pool2d_backward_kernel", "loads"): _TAPS,
    ("max_pool2d_backward_loop_kernel", "loads"): _TAPS,
    ("max_pool3d_backward_kernel", "loads"): _TAPS,
    ("pool_rows_backward_kernel", "loads"): _TAPS,
    ("small_mean_kernel", "stores"): _MEANS,
    ("spatial_mean_kernel", "stores"): _MEANS,
    ("spread_mean_kernel", "loads"): _SPREAD,
    ("dropout_kernel", "loads"): _NUMBERS,
    ("elementwise_loss_forward_kernel", "stores"): _NUMBERS,
    ("elementwise_loss_backward_kernel", "loads"): _NUMBERS,
    ("loss_total_kernel", "stores"): _NUMBERS,
    ("cross_entropy_forward_kernel", "loads"): _ROWS,
    ("cross_entropy_forward_kernel", "stores"): _ROW_RESULTS,
    ("cross_entropy_backward_kernel", "loads"): _ROWS,
    ("nll_loss_forward_kernel", "loads"): _ROWS,
    ("nll_loss_forward_kernel", "stores"): _ROW_RESULTS,
    ("nll_loss_backward_kernel", "loads"): _ROWS,
}

# op, workload, kernel, loads or stores, and a dtype where it is not both, by reason
OF_WORKLOADS: set[tuple[str, ...]] = set()


def _explain(reason: str, *lines: str) -> None:
    """Adds "op workload kernel", with "/loads", "/stores" or neither for both, and a dtype."""
    assert reason
    for line in lines:
        op, workload, kernel, *dtype = line.split()
        name, _, kinds = kernel.partition("/")
        for kind in [kinds] if kinds else ["loads", "stores"]:
            OF_WORKLOADS.add((op, workload, name, kind, *dtype))


_explain(
    "rows of 55 or 35 pixels, or 33 channels: few of them begin on 16 bytes; the single elements "
    "of a warp are side by side, so that vectors would move no fewer bytes",
    "max_pool2d odd max_pool2d_forward_kernel",
    "max_pool2d odd max_pool2d_backward_kernel",
    "max_pool2d odd-channels-last max_pool2d_forward_kernel",
    "max_pool2d odd-channels-last max_pool2d_backward_kernel",
    "avg_pool2d odd avg_pool2d_forward_kernel",
    "avg_pool2d odd avg_pool2d_backward_kernel",
    "avg_pool2d inception-5b-contiguous avg_pool2d_forward_kernel",
    "avg_pool2d inception-5b-contiguous avg_pool2d_backward_kernel",
)
_explain(
    "adaptive windows of rows begin anywhere, and differ in their number of pixels",
    "adaptive_max_pool2d overlap max_pool2d_forward_kernel",
    "adaptive_max_pool2d overlap max_pool2d_backward_loop_kernel",
    "adaptive_avg_pool3d c3d adaptive_avg_pool_kernel",
)
_explain(
    "windows of 3 that step by 2 take a column, or a window, of a neighbour's step: it lies one "
    "element from where a vector could begin; what is of the own step is read wide",
    "max_pool2d resnet50-stem max_pool_rows_forward_kernel/loads",
    "max_pool2d resnet50-stem pool_rows_backward_kernel/loads",
)
_explain(
    "a number of elements that 16 does not divide: the compiler masks them one by one",
    "relu odd activation_forward_kernel",
    "relu odd activation_backward_kernel",
    "binary_cross_entropy odd elementwise_loss_forward_kernel",
    "binary_cross_entropy odd elementwise_loss_backward_kernel",
    "binary_cross_entropy_with_logits odd elementwise_loss_forward_kernel",
    "binary_cross_entropy_with_logits odd elementwise_loss_backward_kernel",
    "mse_loss odd elementwise_loss_forward_kernel/loads",
    "mse_loss odd elementwise_loss_backward_kernel",
    # of sums of programs: few bytes
    "mse_loss odd loss_total_kernel/loads",
    "mse_loss images-channels-last loss_total_kernel/loads",
    "l1_loss boxes loss_total_kernel/loads",
    "smooth_l1_loss boxes loss_total_kernel/loads",
    "huber_loss boxes loss_total_kernel/loads",
)
_explain(
    "every second element of memory",
    "relu sliced activation_forward_kernel/loads",
)
_explain(
    "operands in two orders, channels last and not: no walk is along both, and three channels are "
    "no vector; one order for both is `test_operands_of_one_order_are_read_in_vectors`",
    *(
        f"{op} images-channels-last elementwise_loss_{kernel}"
        for op in ("mse_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
        for kernel in ("forward_kernel/loads", "backward_kernel")
    ),
    *(
        f"{op} images-channels-last elementwise_loss_{kernel}"
        for op in ("l1_loss", "smooth_l1_loss", "huber_loss")
        for kernel in ("forward_kernel", "backward_kernel")
    ),
)
_explain(
    "rows of 10 or, in 16 bits, 100 classes: most begin on no 16 bytes",
    "cross_entropy cifar cross_entropy_forward_kernel/loads",
    "cross_entropy cifar cross_entropy_backward_kernel",
    "cross_entropy 100-classes cross_entropy_forward_kernel/loads f16",
    "cross_entropy 100-classes cross_entropy_backward_kernel f16",
)
_explain(
    "the first and the last tile of a row of 50257 classes; all between are wide",
    "cross_entropy vocabulary cross_entropy_backward_kernel/stores",
)
_explain(
    "rows of 21 classes: most begin on no 16 bytes",
    "cross_entropy images-channels-last cross_entropy_forward_kernel/loads",
    "cross_entropy images-channels-last cross_entropy_backward_kernel",
)
_explain(
    "of each row the gradient of one class, among zeros",
    "nll_loss imagenet nll_loss_backward_kernel/stores",
    "nll_loss images-channels-last nll_loss_backward_kernel/stores",
)
