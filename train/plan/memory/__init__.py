"""How much memory every rank takes."""
