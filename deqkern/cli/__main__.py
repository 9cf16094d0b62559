"""`python -m deqkern.cli`."""

from . import app

app(prog_name="deqkern")
