"""Quantised checkpoint folders: their weights as plain tensors, dequantised when they are read."""
