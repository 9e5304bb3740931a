"""Studies that train many runs and answer a question."""
