"""Readers of data sets as their sites ship them: one file a format."""
