"""One rank of a job, alone on the device at hand, beside its plan."""
