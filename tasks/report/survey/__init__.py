"""What the survey prints, as CSV files."""
