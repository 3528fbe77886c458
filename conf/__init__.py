"""Recipes, option groups, and the typed schema of a run with its rules. Imports no torch."""
