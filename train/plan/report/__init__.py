"""Outputs of a plan: a screen, a page, plan.json."""
