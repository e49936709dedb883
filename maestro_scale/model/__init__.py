"""The MAESTRO network: configuration, architecture, masking, targets, heads and cost."""
