"""Pure functions on tensors: no modules, no files. One folder an operator."""

from importlib.util import find_spec

# Whether kernels can be compiled here, for GPUs that there may be.
HAS_TRITON = find_spec("triton") is not None
