"""Where processes run: this machine, torchrun or Slurm. Imports no torch and no train."""
