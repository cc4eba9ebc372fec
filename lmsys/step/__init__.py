"""What makes the training step fast: one operation a file, blocks with a written backward pass, their planner, and CUDA graphs."""
