"""What is learned: MAESTRO's architecture, masking, targets and cost."""
