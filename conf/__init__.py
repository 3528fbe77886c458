"""How a run is described: recipes, groups, the typed schema and its rules. Imports no torch."""
