"""Verbs of choosing parameters."""
