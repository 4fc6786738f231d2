"""The nodes and ranks of a job, and how its ranks are started."""
