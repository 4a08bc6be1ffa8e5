"""Pure functions on tensors: no modules, no files. One folder an operator."""
