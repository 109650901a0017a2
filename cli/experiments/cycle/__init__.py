"""Learning cycles: a student becomes a teacher of the next student."""
