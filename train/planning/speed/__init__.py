"""How long a step takes: what there is to do, how fast devices do it, and who waits for whom."""
