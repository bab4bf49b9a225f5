"""Scaling laws: runs that measure them, fits, forecasts, and the law that a schedule reads."""
