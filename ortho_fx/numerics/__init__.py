"""Moments, samples, least squares, starts and fits: the numerics of any basis."""
