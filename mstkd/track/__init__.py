"""Where figures of a run go: JSON lines and MLflow."""
