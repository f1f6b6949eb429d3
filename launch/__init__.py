"""How a run starts: command line, recipes, cluster jobs. Importing it loads nothing heavy."""
