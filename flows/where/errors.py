"""Errors of the places where a flow runs."""


class ClusterError(RuntimeError):
    """A cluster that cannot run our steps."""
