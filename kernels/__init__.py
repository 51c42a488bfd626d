"""Triton kernels that register against the operations of `sdcore.ops`."""
