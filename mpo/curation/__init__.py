"""Inspect, check and convert preference data: the actions of `mpo data`."""
