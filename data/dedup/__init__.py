"""Which documents say what another one says already: signatures of each document, then the comparison of all."""
