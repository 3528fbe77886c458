"""Hooks of a run. hook_list.py has their order; train/loop/live_run.py defines a hook."""
