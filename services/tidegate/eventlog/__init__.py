"""The log: interface, Kafka, memory, the owner's log-then-tell loop, and the rule that voids zombies."""
