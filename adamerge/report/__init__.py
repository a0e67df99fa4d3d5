"""Numbers for people: accuracies, what is measured before a run, tables, pictures, tracking."""
