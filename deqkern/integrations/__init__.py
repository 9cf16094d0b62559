"""deqkern inside other libraries. Each module needs its library; importing deqkern needs none."""
