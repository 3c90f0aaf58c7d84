"""The functional API: one line per family.

Namespaces of ops registered with torch (`aten`, ...) are found here too, for programs that import
tritorch as torch.
"""

from typing import Any

import torch

from tritorch.ops.activation import gelu as gelu
from tritorch.ops.activation import hardsigmoid as hardsigmoid
from tritorch.ops.activation import hardswish as hardswish
from tritorch.ops.activation import leaky_relu as leaky_relu
from tritorch.ops.activation import relu as relu
from tritorch.ops.activation import relu6 as relu6
from tritorch.ops.activation import sigmoid as sigmoid
from tritorch.ops.activation import silu as silu
from tritorch.ops.activation import tanh as tanh
from tritorch.ops.adam import adam_step as adam_step
from tritorch.ops.adaptive_max_pool import adaptive_max_pool2d as adaptive_max_pool2d
from tritorch.ops.adaptive_pool import adaptive_avg_pool1d as adaptive_avg_pool1d
from tritorch.ops.adaptive_pool import adaptive_avg_pool2d as adaptive_avg_pool2d
from tritorch.ops.adaptive_pool import adaptive_avg_pool3d as adaptive_avg_pool3d
from tritorch.ops.avg_pool import avg_pool2d as avg_pool2d
from tritorch.ops.batch_norm import batch_norm as batch_norm
from tritorch.ops.binary_cross_entropy import binary_cross_entropy as binary_cross_entropy
from tritorch.ops.binary_cross_entropy import (
    binary_cross_entropy_with_logits as binary_cross_entropy_with_logits,
)
from tritorch.ops.conv import conv2d as conv2d
from tritorch.ops.conv1d import conv1d as conv1d
from tritorch.ops.conv3d import conv3d as conv3d
from tritorch.ops.conv_batch_norm import conv2d_batch_norm as conv2d_batch_norm
from tritorch.ops.conv_transpose import conv_transpose1d as conv_transpose1d
from tritorch.ops.conv_transpose import conv_transpose2d as conv_transpose2d
from tritorch.ops.conv_transpose import conv_transpose3d as conv_transpose3d
from tritorch.ops.cross_entropy import cross_entropy as cross_entropy
from tritorch.ops.dropout import dropout as dropout
from tritorch.ops.group_norm import group_norm as group_norm
from tritorch.ops.instance_norm import instance_norm as instance_norm
from tritorch.ops.l1_loss import huber_loss as huber_loss
from tritorch.ops.l1_loss import l1_loss as l1_loss
from tritorch.ops.l1_loss import smooth_l1_loss as smooth_l1_loss
from tritorch.ops.layer_norm import layer_norm as layer_norm
from tritorch.ops.linear import linear as linear
from tritorch.ops.matmul import matmul as matmul
from tritorch.ops.max_pool import max_pool2d as max_pool2d
from tritorch.ops.mse_loss import mse_loss as mse_loss
from tritorch.ops.nll_loss import nll_loss as nll_loss
from tritorch.ops.pool1d import avg_pool1d as avg_pool1d
from tritorch.ops.pool1d import max_pool1d as max_pool1d
from tritorch.ops.pool3d import avg_pool3d as avg_pool3d
from tritorch.ops.pool3d import max_pool3d as max_pool3d
from tritorch.ops.reduce import channel_sum as channel_sum
from tritorch.ops.sgd import sgd_step as sgd_step
from tritorch.ops.softmax import log_softmax as log_softmax
from tritorch.ops.softmax import softmax as softmax


def __getattr__(name: str) -> Any:
    # torch.ops makes a namespace of any name: one of ours, misspelt, must not become one
    registered = {op.partition("::")[0] for op in torch._C._dispatch_get_all_op_names()}
    if name in registered:
        return getattr(torch.ops, name)
    raise AttributeError(f"tritorch has no op, and torch no namespace of ops, {name!r}")
