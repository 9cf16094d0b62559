"""The engine: the one iteration loop, which asks for evaluations and is told their results."""
