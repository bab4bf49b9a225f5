"""Which documents say what another one says already: signatures of each document, then the comparison of all."""

from data.dedup.duplicates import Cleaned, Decision, decide, edges_of
from data.dedup.signatures import Dedup, MinHash, Signer, columns

__all__ = ["Cleaned", "Decision", "Dedup", "MinHash", "Signer", "columns", "decide", "edges_of"]
