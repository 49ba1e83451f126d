"""MixMatch in the trainers that people have: glue only, one file for each."""
