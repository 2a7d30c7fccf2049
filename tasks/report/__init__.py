"""Pages: what other verbs found, shown; nothing is computed here."""
