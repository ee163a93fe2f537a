"""`python -m common` is `uad`."""

from .cli import app

app()
