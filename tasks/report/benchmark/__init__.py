"""The page of a comparison: tables, pictures, CSV and Markdown."""
