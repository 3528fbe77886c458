"""Which layouts there are, and what would make one fit."""
