"""Bytes, arrays and records under keys."""
