"""The JAX engine: TPU, GPU and CPU."""
