"""Import and export of weights: the original checkpoints of IGNF/MAESTRO, training checkpoints, and safetensors."""
