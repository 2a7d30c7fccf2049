"""The verb `compare`: which method is best, by how much, and how certain that is."""
