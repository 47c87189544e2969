"""Training scripts: short stories, run by accelerate launch or by the command line."""
