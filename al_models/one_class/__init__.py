"""Methods that enclose the normal class (survey, III-E)."""
