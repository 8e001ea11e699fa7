"""One file is one question, answered by a measurement. `python -m experiments` lists them."""
