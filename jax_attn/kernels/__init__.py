"""Implementations of `jax_attn.dot_product_attention`, one file each."""
