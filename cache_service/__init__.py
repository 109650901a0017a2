"""Everything that makes, keeps or hands out recorded rows."""
