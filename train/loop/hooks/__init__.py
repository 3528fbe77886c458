"""What looks at a run or adds to it; hook_list.py has the order and train/loop/live_run.py what a hook is."""
