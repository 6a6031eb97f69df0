"""Folder layouts: a file each, that reads it, writes it and makes a new one."""
