"""The functional API: one line per family."""

from tritorch.ops.activation import relu as relu
from tritorch.ops.matmul import linear as linear
from tritorch.ops.matmul import matmul as matmul
from tritorch.ops.reduce import channel_sum as channel_sum
