"""MixMatch in other libraries' trainers, one thin file for each."""
