"""Plans a run before it starts: its memory and its speed."""
