"""Teachers: frozen networks by name, their identity, and the check that they know the dataset."""
