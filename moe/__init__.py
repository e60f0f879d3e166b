"""Mixture-of-Experts inference from expert slots: models larger than fast memory, exact by default."""

__version__ = "0.1.0"
