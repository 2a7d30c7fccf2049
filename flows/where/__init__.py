"""Where a flow runs: runners, cluster, the local server, and watching it."""
