"""YAML and `key=value` in, checked objects out: settings, a suite, a run's inputs, what learns."""
