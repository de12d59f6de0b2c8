"""Kernels: what multiplies activations with packed weights. `registry.py` chooses among them.

This file imports nothing: with the checkout's root on sys.path, transformers finds this folder when it looks for
another project's package called `kernels`, and importing it must then be harmless.
"""
