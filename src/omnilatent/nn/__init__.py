"""Layers and machinery that several model families share. So far: whole-image results from tiles (tiles.py)."""
