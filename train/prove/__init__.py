"""mode=prove: checks that a layout trains the model, by comparison with a plain process (train/docs/prove.md).

A proof consists of the checks `exact`, `fp32`, `recipe` and `tiles`; messages call them passes.
"""
