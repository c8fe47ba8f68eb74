"""The pure heart: events, commands, folds and scheduling decisions.

Nothing here reads a clock, draws a random number or does I/O; `now` and ids are arguments. Imports: the standard library,
msgspec, and the CEL and JSON Schema evaluators (pure functions of their arguments).
"""
