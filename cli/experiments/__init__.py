"""Commands that train several configurations and make a table: demo, reproduce, cycle, bench."""
