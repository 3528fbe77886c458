"""Where processes run: this machine, under torchrun, or the nodes of a Ray cluster. Imports no torch and no train."""
