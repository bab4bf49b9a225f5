"""Matrix products in FP8 as DeepSeek-V3 trains with them (§3.3): all three of every linear map of a block and of its experts."""

TILE = 128  # numbers along a sum that share a scale
