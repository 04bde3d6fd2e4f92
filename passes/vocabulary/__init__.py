"""Which callables are activations, which scalar function each computes, and what stands in their place."""
