"""Which callables are activations, which scalar function each computes, and how the passes get an expansion."""
