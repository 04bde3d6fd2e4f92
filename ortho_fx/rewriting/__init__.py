"""What a user does to a model: rewrite, revert, calibrate, check, anneal; and the backend of `torch.compile`."""
