"""Layers, attention kernels, low-rank adapters, int8 products."""
