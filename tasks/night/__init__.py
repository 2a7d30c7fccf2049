"""Verbs of a night: screen what is new, prove a challenger, decide."""
