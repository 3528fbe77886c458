"""Applies CPU and GPU settings on import. Every program that computes imports this module before torch."""

from train.kernels.cpu.processor import tune_cpu, tune_gpu

tune_cpu()
tune_gpu()
