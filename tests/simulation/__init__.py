"""Deterministic simulation: every service on the log in memory, under one seed, while everything goes wrong."""
