"""Measures what is shipped: the services as separate processes, with budget, hash chain, fencing and projection."""
