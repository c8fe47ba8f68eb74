"""The throttling demo: many runs of several accounts want one provider, which takes a few at a time."""
