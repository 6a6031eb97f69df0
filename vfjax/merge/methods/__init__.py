"""Merge formulas: pure functions on arrays, found by name; each module registers its own."""
