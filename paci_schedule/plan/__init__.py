"""The planner: a model's layers, their partition into stages, and the search for the fastest pipeline of a job."""
