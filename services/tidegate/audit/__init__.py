"""Books kept a second time, from the bytes of the logs alone, by code that shares nothing with what it checks."""
