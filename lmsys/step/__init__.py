"""What makes the step fast, one operation a file; blocks with a written backward pass, their planner, CUDA graphs."""
