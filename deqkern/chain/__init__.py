"""The chain: noise schedules, where their steps lie, and the coefficients of every step."""
