"""Operations with a plain PyTorch reference and a faster twin of the same signature beside it."""
