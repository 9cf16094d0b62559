"""Other libraries' surfaces."""
