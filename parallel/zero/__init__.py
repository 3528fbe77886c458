"""ZeRO by DeepSpeed: optimizer state, gradients and weights sharded over ranks."""
