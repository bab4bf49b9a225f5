"""The same mathematics over many ranks: layouts, engines, and what is applied to a model before an engine wraps it."""
