"""Methods that model the distribution of normal images or features (survey, III-B)."""
