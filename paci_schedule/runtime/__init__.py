"""What the framework adapters share and needs torch, but no framework: links, the stage runner, the time line."""
