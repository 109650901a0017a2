"""`kd-cache demo`: the whole job on embedded data, measured and shown in one report."""
