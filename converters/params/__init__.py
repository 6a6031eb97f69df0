"""Tensor names: a file a module, which tensor is which parameter, both ways."""
