"""Merges computed block by block from unlabeled images, with nothing left to learn: a file each."""
