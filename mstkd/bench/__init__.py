"""Benchmarks that a user can repeat: ratios from one run on one machine, with the machine and the versions beside them."""
