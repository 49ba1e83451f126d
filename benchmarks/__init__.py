"""Measurements of the package, and what README shows of them."""
