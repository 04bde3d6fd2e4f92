"""Polynomial networks: the polynomial that a network computes, and its cost under homomorphic encryption."""

from ortho_fx.polynomial.conversion import Polynomial, to_polynomial
from ortho_fx.polynomial.costs import PolynomialReport, polynomial_report
from ortho_fx.polynomial.encryption import OpenFHEParameters, TenSEALParameters

__all__ = [
    "OpenFHEParameters",
    "Polynomial",
    "PolynomialReport",
    "TenSEALParameters",
    "polynomial_report",
    "to_polynomial",
]
