"""The budget demo: a tree of accounts, and what happens to runs for which there is no room in it."""
