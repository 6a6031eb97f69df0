"""The merge engine: a method over named tensors, by blocks, threads or meshes."""
