"""What every room stands on: errors, files, dotted paths; it knows nothing of merging."""
