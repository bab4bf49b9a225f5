"""A fit as a page and pictures."""
