"""Implements the hooks of a run. hook_list.py sets their order; train/loop/live_run.py defines a hook."""
