"""Runs that are killed, stopped and cut off at random, and must lose nothing: `python -m tests.chaos --kills 100`."""
