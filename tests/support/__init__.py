"""Shared by tests; no part of the product."""
