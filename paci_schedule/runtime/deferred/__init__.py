"""What a stage learns only some updates later: gradient norms of other stages, and sums of tied weights' gradients."""
