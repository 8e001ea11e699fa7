"""The test suite: one file for each module, plus style, wheel and experiments."""
