"""Fixed points z = f(z) of any map, and measures around them."""
