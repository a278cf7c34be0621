"""Studies: sweeps over settings, populations, exact solutions, and figures."""
