"""How long a schedule takes: a simulator and the figures that come from it."""
