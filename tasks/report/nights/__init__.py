"""The page of the nights: decisions, and how the new images looked."""
