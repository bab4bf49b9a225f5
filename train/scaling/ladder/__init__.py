"""The runs that measure: which are wanted, running them, and what they leave."""
