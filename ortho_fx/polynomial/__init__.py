"""Polynomial networks: the polynomial that a network computes, and its cost under homomorphic encryption."""

from ortho_fx.polynomial.conversion import Polynomial, to_polynomial
from ortho_fx.polynomial.costs import PolynomialReport, polynomial_report

__all__ = ["Polynomial", "PolynomialReport", "polynomial_report", "to_polynomial"]
