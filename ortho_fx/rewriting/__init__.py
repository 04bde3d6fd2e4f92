"""The operations on a model: rewrite, revert, calibrate, check and anneal, and the backend of `torch.compile`."""
