"""One verb a file: keys and small records in, keys and small records out."""
