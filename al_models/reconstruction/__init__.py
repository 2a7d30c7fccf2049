"""Methods that rebuild a normal image and look at what could not be rebuilt (survey, III-A)."""
