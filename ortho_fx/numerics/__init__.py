"""The numerics that all bases share: moments, samples, least squares, initial values and fits."""
