"""Files of weights of any format, read under open_clip's names; nothing in them is executed."""
