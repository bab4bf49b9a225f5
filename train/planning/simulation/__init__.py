"""A step of one process of many, with the real engine on tensors without memory, and its bytes counted."""
