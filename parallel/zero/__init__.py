"""ZeRO: optimizer state, gradients and weights sharded over data-parallel ranks, by DeepSpeed."""
