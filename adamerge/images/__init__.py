"""Data sets on disk or the hub -> unlabeled uint8 batches; labels for evaluation only."""
