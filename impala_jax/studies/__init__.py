"""Studies: sweeps over settings, population based training, exact solutions, and figures."""
