"""What the vectors of a library are searched with: one protocol, a rung of the ladder per file."""
