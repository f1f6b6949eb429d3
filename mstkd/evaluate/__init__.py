"""Evaluation protocol: subsets, metrics, report, figures."""
