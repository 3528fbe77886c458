"""Imported before torch by every program that computes: settings as a first import, so that all others stand behind it as usual."""

from train.kernels.cpu.processor import tune_cpu, tune_gpu

tune_cpu()
tune_gpu()
