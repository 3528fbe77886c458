"""mode=prove: whether a layout trains the model, held against a plain process (train/docs/prove.md)."""
