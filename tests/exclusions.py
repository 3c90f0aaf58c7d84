"""Where tritorch differs from torch on torch's own sample calls, and why; all else must agree.

tests/test_opinfo.py and tests/test_moduleinfo.py fail for a difference that is not listed here, and
for an entry that no difference needs.
"""

from __future__ import annotations

from typing import NamedTuple


class Exclusion(NamedTuple):
    """Differences of one kind (see `databases.KINDS`) in what `test` does with `subject`.

    subject: an op or a layer.  calls: a regular expression found in the difference as printed,
    which holds the call.  device: where there is the difference, "cpu" or "cuda"; empty for both.
    sometimes: whether chance decides that there is one.
    """

    subject: str
    test: str
    kind: str
    calls: str
    reason: str
    device: str = ""
    sometimes: bool = False


def of(subject: str, test: str, device: str) -> list[Exclusion]:
    """What is listed of a test of an op or a layer on a device."""
    return [
        one
        for one in EXCLUSIONS
        if (one.subject, one.test) == (subject, test) and one.device in ("", device)
    ]


# ops without an entry in torch's database of ops, layers without one in that of layers
WITHOUT_ENTRY = {
    "adam_step": "one step over many tensors; torch has it inside torch.optim alone",
    "sgd_step": "one step over many tensors; torch has it inside torch.optim alone",
    "channel_sum": "a sum over all axes but one, which is no signature of torch's",
    "conv2d_batch_norm": "two functions of torch's, each of which has an entry",
    "Hardsigmoid": "torch lists no inputs for this layer; its op has an entry",
    "Dropout": "torch lists no inputs for this layer; its op has an entry",
}

# volumes that are channels_last_3d give means that are, too, and images normalised ones
KEEPS_FORMAT = "keeps the order of dimensions, which torch gives up"
SAME = "torch warns of a copy of the input, padded, that ours does not make"
CONTIGUOUS_ONLY = "torch's CPU function takes no channels_last here, or raises in its gradient"
# the second argument's gradient
OF_WEIGHT = r"\[0\]\[1\] has strides"
CUDA_WINDOWS = "torch's CUDA gradient of windows that overlap is wrong in channels_last"
LIBRARY = "on a CPU the strides of torch's gradients of weights are those of the library it calls"
RANDOM = "which elements are dropped comes from another generator than torch's"
OF_ONE = "the gradient of one element's norm is 0, short of what a fused product leaves unrounded"
EVALUATES = "an evaluation is the input itself: no kernel is needed"

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        "max_pool3d", "kernels", "raises", "Unsupported memory format", CONTIGUOUS_ONLY, "cpu"
    ),
    Exclusion("avg_pool2d", "kernels", "gradients", "", CUDA_WINDOWS, "cuda"),
    Exclusion("avg_pool3d", "reference_path", "strides", "", KEEPS_FORMAT),
    Exclusion("avg_pool3d", "kernels", "strides", "", KEEPS_FORMAT),
    Exclusion("adaptive_avg_pool3d", "reference_path", "strides", "", KEEPS_FORMAT),
    Exclusion("adaptive_avg_pool3d", "kernels", "strides", "", KEEPS_FORMAT),
    Exclusion("instance_norm", "reference_path", "strides", "", KEEPS_FORMAT),
    Exclusion("instance_norm", "kernels", "strides", "", KEEPS_FORMAT),
    Exclusion("conv2d", "reference_path", "warns", "padding='same'", SAME),
    Exclusion("conv2d", "kernels", "warns", "padding='same'", SAME),
    Exclusion("conv2d", "kernels", "strides", OF_WEIGHT, LIBRARY),
    Exclusion("conv3d", "reference_path", "warns", "padding='same'", SAME),
    Exclusion("conv_transpose2d", "kernels", "strides", OF_WEIGHT, LIBRARY),
    Exclusion("nll_loss", "reference_path", "raises", "must be contiguous", CONTIGUOUS_ONLY),
    Exclusion("nll_loss", "kernels", "raises", "must be contiguous", CONTIGUOUS_ONLY),
    Exclusion("dropout", "kernels", "path", r"training=False.*nothing was launched", EVALUATES),
    Exclusion("dropout", "kernels", "values", "p=0.5, training=True", RANDOM, "cpu"),
    Exclusion("dropout", "kernels", "gradients", "p=0.5, training=True", RANDOM, "cpu"),
    # five elements of a generator that has no seed
    Exclusion("dropout", "kernels", "values", "p=0.5, training=True", RANDOM, "cuda", True),
    Exclusion("dropout", "kernels", "gradients", "p=0.5, training=True", RANDOM, "cuda", True),
    Exclusion("layer_norm", "kernels", "gradients", r"float32\[1\], \(1\)", OF_ONE, "cuda"),
    Exclusion("NLLLoss", "kernels", "path", "6 dimensions", "kernels take five dimensions at most"),
    Exclusion(
        "matmul",
        "kernels",
        "path",
        "batches that broadcast",
        "the gradient of a batch that broadcasts would round every product before adding it",
    ),
)
