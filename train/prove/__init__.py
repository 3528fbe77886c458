"""mode=prove: checks that a layout trains the model correctly, by comparison with one plain process
(train/docs/prove.md).

A proof consists of the checks `exact`, `loop`, `fp32`, `recipe` and `tiles`. Messages call them passes.
"""
