"""Whether a schedule keeps its rules, and whether its messages can ever wait in a circle."""
