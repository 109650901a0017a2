"""Plan, shards, engine: recording a teacher."""
