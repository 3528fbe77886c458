"""What is trained, and the loop."""
