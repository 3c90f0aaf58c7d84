"""The GPUs that kernels on tensor descriptors are for: numbers of an H100 SXM and of an H200."""

# constants, so that sums are split alike on every GPU
MULTIPROCESSORS = 132
# bytes that the programs on a multiprocessor share
SHARED_MEMORY = 227 * 1024
