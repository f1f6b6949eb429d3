"""Several evaluated runs side by side: means, differences with intervals, tests, figures, one report."""
