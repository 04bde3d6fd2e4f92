"""Training data: tokens and images, their augmentation, and the loader."""
