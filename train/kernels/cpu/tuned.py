"""Applies CPU and GPU settings on import. Import it before torch."""

from train.kernels.cpu.processor import tune_cpu, tune_gpu

tune_cpu()
tune_gpu()
