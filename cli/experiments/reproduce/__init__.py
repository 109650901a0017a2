"""Published tables, trained again with this project: one file per reproduction."""
