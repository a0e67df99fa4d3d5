"""What a failed download leaves in place of a file."""

from __future__ import annotations

_PAGES = ("<!doctype", "<html", "<head", "<?xml", "<!--")


def failed_download(head: bytes, what: str, text: bool = True) -> str | None:
    """What a file is that begins so, for a message; None where nothing shows that it failed.

    Args:
        head: its first bytes, a few hundred.
        what: it should hold.
        text: whether a text cannot be that.
    """
    shown = head.decode("utf-8-sig", "replace").rstrip("\ufffd").strip()
    if not head:
        return "empty (0 bytes): get it again"
    if shown.startswith("version https://git-lfs"):
        return f"a Git LFS pointer, not the {what}: run `git lfs pull` there"
    if shown.lower().startswith(_PAGES):
        return "a web page saved under that name: the download failed (a login? a limit?)"
    if not head.strip(b"\0"):
        return "zeros where its header should be: an interrupted download; get it again"
    readable = shown and "\ufffd" not in shown and "".join(shown.split()).isprintable()
    if text and readable:
        return f"a text that begins {shown[:40]!r}, no {what}: the download failed?"
    return None
