"""Live fuel moisture: 2,313 real pixel series of the western USA, with two labels."""
