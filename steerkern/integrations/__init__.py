"""Bridges to other programs: their file formats and their engines, one module each."""
