"""Side-by-side measurements against peers and limits. Each module runs by `python -m bench.NAME`."""
