"""The MLX engine: Apple Silicon, CPU and CUDA."""
