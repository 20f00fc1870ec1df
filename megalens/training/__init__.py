"""One training: where it starts, its loop, what it measures and writes, how it stops."""
