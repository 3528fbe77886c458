"""The first ten minutes on a GPU: `python -m bench.gpu`, see __main__.py."""
