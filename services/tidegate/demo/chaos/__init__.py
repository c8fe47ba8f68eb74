"""Chaos: many runs while everything that carries them is killed, frozen and restarted, and the proof that nothing came of it."""
