"""Networks and training recipes that reproduce published MixMatch settings."""
