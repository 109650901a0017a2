"""`kd-cache demo`: the whole job on embedded data, measured and told in one report."""
