"""How it is learned: the engine, the loop and the parts around it, each with one job."""
