"""Raw text → tokens on disk → batches. Imports nothing of the project."""
