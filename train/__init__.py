"""What is trained, and the loop."""

__version__ = "0.1.0"
