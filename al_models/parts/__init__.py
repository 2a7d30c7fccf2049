"""Blocks that several methods share. A block moves here when it gets its third user."""
