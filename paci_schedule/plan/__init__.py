"""Which pipeline suits a job: layers, their division into stages, and the search."""
