"""What is done to each document before it counts: mended, looked at, and kept or rejected with a reason."""
