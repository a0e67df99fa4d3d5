"""The commands of `adamerge`; heavy imports wait until one of them needs them."""

from adamerge.cli.command import main

__all__ = ["main"]
