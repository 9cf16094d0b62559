"""The model along a chain: the only callers of the user's model."""
