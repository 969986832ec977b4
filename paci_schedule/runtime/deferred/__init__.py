"""What a stage learns late by design: gradient norms and tied sums of other stages."""
