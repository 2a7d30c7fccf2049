"""What to run: the models that run files, options and the forms of the Prefect UI share."""
