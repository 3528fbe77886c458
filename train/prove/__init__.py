"""mode=prove: compares a layout with a plain implementation in one process (train/docs/prove.md).

The checks are `exact`, `loop`, `fp32`, `recipe` and `tiles`. In prove.json, a check is called a pass.
"""
