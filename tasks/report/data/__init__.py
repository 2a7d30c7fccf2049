"""The page of the data: verdicts, findings and pictures."""
