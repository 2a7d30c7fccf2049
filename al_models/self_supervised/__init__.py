"""Methods that learn from a task made out of good images alone (survey, III-D)."""
