"""Training from the command line: one run, runs side by side, and the networks they train."""
