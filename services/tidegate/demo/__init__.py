"""Demonstrations that prove what they show: every line of the proof is the answer to a query."""
