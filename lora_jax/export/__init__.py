"""Exporters: each writes aside, reloads what it wrote, compares it with its source, and only then renames it."""
