"""mode=prove: checks that a layout trains the model correctly, by comparison with a plain implementation in one process
(train/docs/prove.md).

A proof consists of the checks `exact`, `loop`, `fp32`, `recipe` and `tiles`. In prove.json, a check is called a pass.
"""
