"""Calls that come again: what a call allocated and launched is done once more, without asking why.

A program calls an op with the same shapes over and over.  The first calls go their way, the next
one is watched, and from then on its allocations, copies and launches are repeated with the tensors
at hand; where its result has a gradient, the nodes that it gave autograd.  Only what did nothing
else is repeated: a call that did more in torch, or took a tensor from elsewhere than its arguments,
goes its way for ever.

`decorator` is what ops use.  `seen` says what makes two calls alike and keeps what is known of
each; `watched` watches a call without a gradient, `composed` one with, whose nodes `nodes` makes
once more; `listener` is the mode through which both hear of torch.
"""
